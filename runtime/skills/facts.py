"""Names and numbers of a text: what a summary must not invent and a rewritten text must not lose."""

from __future__ import annotations

import re
from collections.abc import Collection

NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
"""1,200 and 14:30 and 2026-03-04 are one number each; digits are those of every script (Unicode's Nd)."""
_JOINING, _BREAK = r".,:/\-", r"\n"
_WORD = re.compile(r"[^\W\d_](?:[\w&'’-]*\w)?")
_GENITIVE = re.compile(r"['’]s?$")
_OPENERS = " \t\"'“‘«(["
_SPEAKER = re.compile(r"^([^\n:(]{1,60}?)(?: \([^\n)]*\))?:\s", re.MULTILINE)


def numbers(text: str) -> list[str]:
    """Written in digits; each once, in the order of the text."""
    return list(dict.fromkeys(NUMBER.findall(text)))


def names(text: str) -> list[str]:
    """Words with a capital where none is needed, words of two capitals, and speakers at the beginning of a line; each
    once, in the order of the text. A language that writes other words so has more of them."""
    speakers = {word for found in _SPEAKER.finditer(text) for word in _WORD.findall(found[1])}
    found: dict[str, None] = {}
    for each in _WORD.finditer(text):
        word = _GENITIVE.sub("", each[0])
        if len(word) < 2 or not word[0].isupper() or re.match(r"I['’]", word):
            continue
        shouted = sum(letter.isupper() for letter in word) > 1
        if shouted or word in speakers or not _begins_sentence(text, each.start()):
            found[word] = None
    return list(found)


def missing(source: str, text: str, known: Collection[str] | None = None) -> list[str]:
    """Names and numbers of the source that the text lacks.

    Args:
        known: names of the document that the source is a piece of. None: the source's own.
    """
    written, words = set(numbers(text)), {word.casefold() for word in _words(text)}
    present = set(_words(source)) if known is not None else ()
    expected = names(source) if known is None else [name for name in known if name in present]
    lost = [number for number in numbers(source) if number not in written]
    return lost + [name for name in expected if name.casefold() not in words]


def invented(source: str, text: str) -> list[str]:
    """Numbers of the text that the source lacks, and names whose word is nowhere in it."""
    words, known = {word.casefold() for word in _words(source)}, set(numbers(source))
    return [one for one in numbers(text) if one not in known] + [
        one for one in names(text) if one.casefold() not in words
    ]


def _words(text: str) -> list[str]:
    """Without the ending of a genitive."""
    return [_GENITIVE.sub("", word) for word in _WORD.findall(text)]


def _begins_sentence(text: str, place: int) -> bool:
    """Whether a word stands where every word has a capital: behind the end of a sentence, a colon or a line break."""
    before = text[max(0, place - 8) : place].rstrip(_OPENERS)
    return not before or before[-1] in ".!?…:;\n\r-–—•*>#|"


def pattern_with_numbers_of(source: str, *, lines: bool = False) -> str:
    """A regular expression for texts whose numbers are the source's.

    It also leaves out signs that change what a number means, and marks of other formats, unless the source has them.

    Args:
        lines: allow line breaks.
    """
    banned = "".join(sign for sign in "%$€£#*<>{}|`_=\\[]" if sign not in source)
    free = r"[^\d" + re.escape(banned) + r"\t\r" + ("" if lines else _BREAK) + "]"
    first = r"[^\d" + re.escape(banned) + r"\s]"
    known = [number for number in numbers(source) if len(number) <= 40]
    number = "|".join(re.escape(one).replace("\\-", "-") for one in sorted(known, key=lambda one: (-len(one), one)))
    if not number:
        return f"{first}{free}*"
    # a point, colon or dash alone between two numbers would make a third one of them
    between = f"(?:[^\\d{re.escape(banned)}{_JOINING}\\t\\r{'' if lines else _BREAK}]{free}*|[{_JOINING}]{free}+)"
    return f"(?:{first}{free}*)?(?:(?:{number}){between})*(?:{number}){free}*|{first}{free}*"
