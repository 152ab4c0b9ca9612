"""What ends an answer beside the model's own stop tokens: texts that were asked for, and a text that only repeats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST_PERIOD = 64
"""Tokens of a phrase that is watched for."""
LEAST_TOKENS, LEAST_TIMES = 64, 5
"""A phrase was repeated so often, over so many tokens, before an answer ends for it. Lists, tables and rows of dashes
repeat too, but go on to something else before."""


class StopTexts:
    """Text that comes in pieces, up to the first of some texts. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What is certain not to belong to one of the texts, and whether one came."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        held = self._may_begin(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """What was held back; no more comes."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Characters at the end of the text that one of the texts begins with."""
        for count in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - count :]) for stop in self._stops):
                return count
        return 0


class Repetition:
    """Whether an answer has come to repeat a phrase and nothing else."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._runs = np.zeros(LONGEST_PERIOD, np.int64)
        """By the length of a phrase, less one: for how many tokens every token has been the one a phrase before."""
        self._needed = np.maximum(LEAST_TOKENS, LEAST_TIMES * np.arange(1, LONGEST_PERIOD + 1))

    def push(self, token: int) -> bool:
        """Whether the answer ends with this token."""
        before = np.full(LONGEST_PERIOD, -1, np.int64)
        recent = self._tokens[: -LONGEST_PERIOD - 1 : -1]
        before[: len(recent)] = recent
        self._runs = np.where(before == token, self._runs + 1, 0)
        self._tokens.append(token)
        return bool((self._runs >= self._needed).any())
