"""Guessing an answer's next tokens from the text so far, to have several of them verified in one run.

An answer that repeats parts of its prompt (copying, editing, correcting) has phrases that stood there before: what
followed them then is the guess. Source: Saxena 2023, "Prompt Lookup Decoding". Verification takes the logits of every
guessed token from one run, so a wrong guess costs time and changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PHRASES = (8, 5, 3, 2)
"""Tokens of a phrase that is looked up, the longest first."""
SURE = 3
"""Phrases shorter than this are believed only while guesses turn out right."""
FIRST, MOST = 4, 8
"""Tokens guessed at first, and at most."""
TRIALS = 2
"""Runs that may cost more than they gain before there is a pause."""
PAUSE = 64
"""Tokens without a guess after guesses that did not pay; twice as many each time."""


class PromptLookup:
    """The guesses for one sequence. It stops for a while when they do not pay, measured in time."""

    def __init__(self) -> None:
        self._phrases: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in PHRASES}
        self._seen = 0
        self._length = FIRST
        self._step_s: float | None = None
        self._gain = 1.0
        """Time that plain steps would have taken over the time it took; a running mean."""
        self._misses = 0
        self._paused, self._next_pause = 0, PAUSE
        self.drafted = self.accepted = self.runs = 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow these tokens: at most `most`; nothing where no phrase stood before, or during a pause.

        Args:
            tokens: prompt and answer so far; each call's begin with those of the call before.
        """
        self._index(tokens)
        if self._paused > 0:
            self._paused -= 1
            return []
        for size in PHRASES:
            if len(tokens) <= size or (size < SURE and self._gain < 1.2):
                continue
            place = self._phrases[size].get(tuple(tokens[-size:]))
            if place is not None:
                return list(tokens[place : place + min(self._length, most)])
        return []

    def stepped(self, seconds: float) -> None:
        """A plain step took so long."""
        self._step_s = seconds if self._step_s is None else min(0.8 * self._step_s + 0.2 * seconds, 2 * self._step_s)

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """Of so many guessed tokens so many were right, and their run took so long."""
        self.runs, self.drafted, self.accepted = self.runs + 1, self.drafted + drafted, self.accepted + accepted
        self._length = min(MOST, 2 * self._length) if accepted == drafted else max(2, accepted + 1)
        gain = (accepted + 1) * (self._step_s or seconds) / max(seconds, 1e-9)
        self._gain = 0.6 * self._gain + 0.4 * gain
        self._misses = self._misses + 1 if gain < 1 else 0
        if self._misses >= TRIALS:
            self._paused, self._next_pause = self._next_pause, 2 * self._next_pause
            self._misses, self._gain, self._length = TRIALS - 1, 1.0, FIRST
        elif gain > 1.5:
            self._next_pause = PAUSE

    def _index(self, tokens: Sequence[int]) -> None:
        # the phrase that ends with the last token is the one that is looked up, so it is not there yet
        for end in range(max(self._seen, 1), len(tokens)):
            for size in PHRASES:
                if end >= size:
                    self._phrases[size][tuple(tokens[end - size : end])] = end
        self._seen = len(tokens)


class Guesses:
    """Guessed tokens of one sequence whose logits are known, and that nobody has asked for yet.

    They are at the end of the sequence's cache. An answer that takes another way makes them worthless.
    """

    def __init__(self) -> None:
        self.lookup = PromptLookup()
        self._ahead: deque[tuple[int, NDArray[np.float32]]] = deque()
        self._drafted, self._seconds = 0, 0.0

    def __len__(self) -> int:
        return len(self._ahead)

    def verified(self, guess: Sequence[int], logits: Sequence[NDArray[np.float32]], seconds: float) -> None:
        """One run computed the logits [vocabulary] behind each of these tokens."""
        self._ahead.extend(zip(guess, logits, strict=True))
        self._drafted, self._seconds = len(guess), seconds

    def take(self, token: int) -> NDArray[np.float32] | None:
        """The logits behind a token that was chosen, if it is the one that was guessed."""
        if not self._ahead or self._ahead[0][0] != token:
            return None
        _, logits = self._ahead.popleft()
        if not self._ahead:
            self.lookup.learn(self._drafted, self._drafted, self._seconds)
        return logits

    def drop(self) -> int:
        """Forget what is left; how many tokens at the end of the cache that were."""
        wrong = len(self._ahead)
        if wrong:
            self.lookup.learn(self._drafted, self._drafted - wrong, self._seconds)
            self._ahead.clear()
        return wrong
