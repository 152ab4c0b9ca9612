"""How much of a prompt fits: by counting tokens, and without cutting what a person reads as one character."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

RESERVED = 512
"""Tokens of the context that prompts leave to the answer, as in Windows (MicrosoftDocs/windows-ai-docs, pull request
248, a review of 2026-03-25)."""
CHARACTERS_PER_TOKEN = 4
"""About so many in a text of words; only how fast a search is depends on it."""
SURELY_LONG = 4096
"""Characters that a search begins with at least: two texts of which one is so much longer than the other have more
tokens than by which counts go back where a text ends within a token."""
_JOINER = "\u200d"
_KEYCAP = "\u20e3"


def usable_tokens(context_length: int) -> int:
    """Tokens that a prompt may have with all that stands before it; of a short context, three quarters."""
    return context_length - min(RESERVED, context_length // 4)


@dataclass(frozen=True)
class TooLong:
    """A beginning of a text that has more tokens than the limit, and a shorter one that has not."""

    length: int
    tokens: int
    fits: int
    fitting_tokens: int


def too_long(text: str, limit: int, count: Callable[[str], int]) -> TooLong | None:
    """Whether a text has more tokens than the limit: None if not. Of one that is far longer only its beginning is
    counted.

    Args:
        count: tokens of a prompt with this text.
    """
    fits, base, length = 0, 0, max(SURELY_LONG, CHARACTERS_PER_TOKEN * limit)
    while 2 * length < len(text):
        tokens = count(text[:length])
        if tokens > limit:
            return TooLong(length, tokens, fits, base)
        fits, base, length = length, tokens, 2 * length
    tokens = count(text)
    return TooLong(len(text), tokens, fits, base) if tokens > limit else None


def usable_length(text: str, limit: int, count: Callable[[str], int]) -> int:
    """An index into a text, so that what stands before it has at most `limit` tokens; the text's length if all has.

    Where the next character no longer fits. Counts are not quite monotonic, because a longer text can have tokens that
    take in more of it; so there can be several such places, and this is one of them.

    Args:
        count: as for `too_long`.
    """
    found = too_long(text, limit, count)
    if found is None:
        return len(text)
    fits, base, end, tokens = found.fits, found.fitting_tokens, found.length, found.tokens
    guess = True
    while end - fits > 1:
        middle = (fits + end) // 2
        if guess:  # by how many tokens the characters have; they are not spread evenly, so by halves in turn
            share = max(0, limit - base) / max(1, tokens - base)
            middle = min(max(fits + int((end - fits) * share), fits + 1), end - 1)
        guess, counted = not guess, count(text[:middle])
        if counted <= limit:
            fits, base = middle, counted
        else:
            end, tokens = middle, counted
    while fits and (not may_end_before(text, fits) or count(text[:fits]) > limit):
        fits -= 1
    return fits


def may_end_before(text: str, index: int) -> bool:
    """Whether a text may be cut before its character of this index: not between a letter and its accents, in an emoji
    of several characters, a flag, or a line break of two."""
    if not 0 < index < len(text):
        return True
    before, after = text[index - 1], text[index]
    if _continues(after) or before == _JOINER or (before, after) == ("\r", "\n"):
        return False
    if not (_is_regional(before) and _is_regional(after)):
        return True
    start = index
    while start and _is_regional(text[start - 1]):
        start -= 1
    return (index - start) % 2 == 0  # flags are pairs of them


def _continues(character: str) -> bool:
    """Whether a character belongs to the one before it."""
    return (
        character in (_JOINER, _KEYCAP)
        or unicodedata.category(character) in ("Mn", "Me", "Mc")  # variation selectors are Mn
        or 0x1F3FB <= ord(character) <= 0x1F3FF  # colours of skin
        or 0xE0020 <= ord(character) <= 0xE007F  # flags of regions
        or 0x1160 <= ord(character) <= 0x11FF  # Hangul in parts
    )


def _is_regional(character: str) -> bool:
    return 0x1F1E6 <= ord(character) <= 0x1F1FF


def index_of_utf16(text: str, units: int) -> int:
    """The index of a character, from Windows' count: in UTF-16 code units, of which an emoji has two."""
    index = 0
    for character in text:
        units -= 2 if ord(character) > 0xFFFF else 1
        if units < 0:
            break
        index += 1
    return index
