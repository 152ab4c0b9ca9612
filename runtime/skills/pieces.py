"""Dividing a text into pieces that a model can read at once: at paragraphs, else at lines, sentences or words."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from math import ceil

_NO_TITLE = "".join(rf"(?<!\b[A-Z]{letters})" for letters in ("", "[a-z]", "[a-z][a-z]"))
SENTENCE_END = re.compile(rf"(?:[!?…]|{_NO_TITLE}\.)[\"'”’»)\]]*(?=\s)|[。！？][」』”]*")
"""Where a sentence ends. A point inside a number or an address is none, nor one behind a title or initial (Dr. J. Li):
a capital with up to two small letters."""
_BOUNDARIES = (
    re.compile(r"\n[ \t\r]*\n\s*"),
    re.compile(r"\n"),
    re.compile(rf"(?:{SENTENCE_END.pattern})\s*"),
    re.compile(r"[;,:]\s+"),
    re.compile(r"\s+"),
)
"""From coarse to fine; a piece ends behind one."""
_SENTENCE = re.compile(rf"(?:{SENTENCE_END.pattern}|\n)\s*")


def split(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Pieces of at most `limit` tokens, about equally long; together they are exactly the text.

    Args:
        count: tokens of a text. Two texts together may have at most as many as each for itself.

    A single character that has more tokens is a piece all the same.
    """
    if count(text) <= limit or len(text) <= 1:
        return [text] if text else []
    units = [(unit, count(unit)) for unit in _units(text)]
    left = sum(tokens for _, tokens in units)
    pieces: list[str] = []
    size = aim = 0.0  # of the last piece, and what it should have; 0: it takes no more
    for unit, tokens in units:
        if tokens > limit:
            pieces += split(unit, limit, count)
            aim = 0
        elif size + tokens / 2 > aim or size + tokens > limit:
            pieces.append(unit)
            size, aim = tokens, left / ceil(left / limit)
        else:
            pieces[-1] += unit
            size += tokens
        left -= tokens
    return pieces


def _units(text: str) -> list[str]:
    """Two or more parts of a text, at its coarsest boundaries."""
    for boundary in _BOUNDARIES:
        places = [found.end() for found in boundary.finditer(text) if found.end() < len(text)]
        if places:
            return [text[start:end] for start, end in pairwise([0, *places, len(text)])]
    middle = len(text) // 2
    return [text[:middle], text[middle:]]


def sentences(text: str) -> list[str]:
    """Together they are exactly the text. A line ends one too, unless the next goes on with a small letter; blank space
    belongs to the one before it."""
    ends = [
        found.end()
        for found in _SENTENCE.finditer(text)
        if found.end() < len(text) and not (found[0].isspace() and text[found.end()].islower())
    ]
    return [text[start:end] for start, end in pairwise([0, *ends, len(text)])] if text else []
