"""Text that looks like a control token is text: `<|im_end|>` typed by a user does not end the user's turn.

A template writes control tokens and texts into one string, and a tokenizer reads what looks like a control token as
one, whoever wrote it. So a template is given the texts with a mark inside each control token that they hold
(`edgephi/templates/marked_values.py`). Its own tokens have none. Encoding takes the marks out after control tokens were
looked for (`edgephi/tokenizer/marked.py`). A mark is a number: `tojson`, `trim` and changes of case leave it as it is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

_LENGTH = 24
_FIRST, _OTHERS = "7", "012345689"
"""A mark begins with a digit that it has nowhere else, so that it cannot overlap with itself."""


@dataclass(frozen=True)
class ControlToken:
    """An added token that steers a model.

    Args:
        special: the tokenizer says so; decoding leaves it out of an answer's text.
    """

    text: str
    special: bool


def is_control(text: str, *, special: bool) -> bool:
    """Whether an added token is one that texts must not become.

    Special ones are, and of the others those between brackets, such as Phi-4-mini's `<|tool|>`. Runs of spaces, words
    and letters that a tokenizer knows as added tokens are ordinary text.
    """
    if len(text) < 2 or not text.strip():
        return False
    return special or text[0] + text[-1] in {"<>", "[]"}


@dataclass(frozen=True, eq=False)
class ControlTokens:
    """The control tokens of a tokenizer, to be found in texts.

    Args:
        after_normalizer: some are looked for in the normalized text, which may hold more of them than the text does.
        mark: what is put into the ones that texts hold.
    """

    tokens: tuple[ControlToken, ...]
    after_normalizer: bool = False
    mark: str = field(default_factory=lambda: _new_mark())

    def found(self, text: str) -> Iterator[tuple[int, str]]:
        """Every place where one begins, with the longest that does; they may overlap."""
        if self._beginnings is None:
            return
        for hit in self._beginnings.finditer(text):
            for length in self._lengths:
                if (one := text[hit.start() : hit.start() + length]) in self._texts:
                    yield hit.start(), one
                    break

    def edges(self, text: str) -> tuple[bool, bool]:
        """Whether a text could complete a token that begins before it, and one that ends behind it."""
        text = text.strip()
        if not text:
            return False, False
        if f"\0{text}\0" not in self._joined and text in self._joined:
            return True, True
        before = after = False
        for length in range(1, len(text) + 1):
            if (start := text[:length]) not in self._joined:
                break
            before = before or self._joined.count(start + "\0") > (start in self._texts)
        for length in range(1, len(text) + 1):
            if (end := text[-length:]) not in self._joined:
                break
            after = after or self._joined.count("\0" + end) > (end in self._texts)
        return before, after

    def marked(self, text: str, mark: str, *, kept: frozenset[str], edges: bool) -> str:
        """A text with marks in its control tokens.

        Args:
            kept: tokens that stay tokens.
            edges: mark also where a token could be completed by what the template writes around the text.
        """
        places = {place + 1 for place, token in self.found(text) if token not in kept}
        if edges:
            before, after = self.edges(text)
            if before:
                places.add(len(text) - len(text.lstrip()))
            if after:
                places.add(len(text.rstrip()))
        if not places:
            return text
        pieces, last = [], 0
        for place in sorted(places):
            pieces += [text[last:place], mark]
            last = place
        return "".join([*pieces, text[last:]])

    def unused_mark(self, texts: Iterable[str]) -> str:
        """This object's mark, or another one where the texts hold it."""
        mark, searched = self.mark, list(texts)
        while any(mark in text for text in searched):
            mark = _new_mark()
        return mark

    @cached_property
    def _texts(self) -> frozenset[str]:
        return frozenset(token.text for token in self.tokens)

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({len(text) for text in self._texts}, reverse=True)

    @cached_property
    def _joined(self) -> str:
        return "\0" + "\0".join(sorted(self._texts)) + "\0"

    @cached_property
    def _beginnings(self) -> re.Pattern[str] | None:
        pairs = sorted({text[:2] for text in self._texts})
        return re.compile("(?=" + "|".join(map(re.escape, pairs)) + ")") if pairs else None


def _new_mark() -> str:
    source = random.SystemRandom()
    return _FIRST + "".join(source.choice(_OTHERS) for _ in range(_LENGTH - 1))


def other_mark(mark: str) -> str:
    """A mark that differs from another one in each digit."""
    return "".join(str((int(digit) + 1) % 10) for digit in mark)
