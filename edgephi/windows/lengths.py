"""How much of a prompt fits: by counting tokens, and without cutting what a person reads as one character."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

RESERVED = 512
"""Tokens of the context that prompts leave to the answer, as in Windows (MicrosoftDocs/windows-ai-docs, pull request
248, a review of 2026-03-25)."""
_JOINER = "\u200d"
_KEYCAP = "\u20e3"


def usable_tokens(context_length: int) -> int:
    """Tokens that a prompt may have with all that stands before it; of a short context, three quarters."""
    return context_length - min(RESERVED, context_length // 4)


def usable_length(text: str, limit: int, count: Callable[[str], int]) -> int:
    """An index into a text, so that what stands before it has at most `limit` tokens; the text's length if all has.

    Where the next character no longer fits. Counts are not quite monotonic, because a longer text can have tokens that
    take in more of it; so there can be several such places, and this is one of them.

    Args:
        count: tokens of a prompt with this text.
    """
    if count(text) <= limit:
        return len(text)
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if count(text[:middle]) <= limit:
            fits = middle
        else:
            too_long = middle
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
