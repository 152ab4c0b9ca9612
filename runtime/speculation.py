"""Guessing an answer's next tokens from the text so far, to have several of them verified in one run.

An answer that repeats parts of its prompt (copying, editing, correcting) has phrases that stood there before: what
followed them then is the guess. Source: Saxena 2023, "Prompt Lookup Decoding". Verification takes the logits of every
guessed token from one run, so a wrong guess costs time and changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

PHRASES = (8, 5, 3, 2)
"""Tokens of a phrase that is looked up, the longest first."""
SURE = 3
"""Phrases shorter than this are believed only while guesses turn out right."""
TRIALS = 2
"""Runs that may cost more than they gain before there is a pause."""
PAUSE = 64
"""Tokens without a guess after guesses that did not pay; twice as many each time."""

Known = TypeVar("Known")


@dataclass(frozen=True)
class Lengths:
    """How many tokens are guessed: at first, at least after wrong ones, and at most."""

    first: int
    least: int
    most: int

    @classmethod
    def always(cls, length: int) -> Lengths:
        """For runs that take their time however many tokens they compute."""
        return cls(length, length, length)


GROWING = Lengths(first=4, least=2, most=8)
"""For runs in which every token costs: guesses grow while they are right."""


class PromptLookup:
    """The guesses for one sequence. It stops for a while when they do not pay, measured in time."""

    def __init__(self, lengths: Lengths = GROWING) -> None:
        self._lengths = lengths
        self._phrases: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in PHRASES}
        self._seen = 0
        self._length = lengths.first
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
        longer, shorter = min(self._lengths.most, 2 * self._length), max(self._lengths.least, accepted + 1)
        self._length = longer if accepted == drafted else shorter
        gain = (accepted + 1) * (self._step_s or seconds) / max(seconds, 1e-9)
        self._gain = 0.6 * self._gain + 0.4 * gain
        self._misses = self._misses + 1 if gain < 1 else 0
        if self._misses >= TRIALS:
            self._paused, self._next_pause = self._next_pause, 2 * self._next_pause
            self._misses, self._gain, self._length = TRIALS - 1, 1.0, self._lengths.first
        elif gain > 1.5:
            self._next_pause = PAUSE

    def _index(self, tokens: Sequence[int]) -> None:
        # the phrase that ends with the last token is the one that is looked up, so it is not there yet
        for end in range(max(self._seen, 1), len(tokens)):
            for size in PHRASES:
                if end >= size:
                    self._phrases[size][tuple(tokens[end - size : end])] = end
        self._seen = len(tokens)


class Guesses(Generic[Known]):
    """Guessed tokens of one sequence that a run has verified, and that nobody has asked for yet.

    They are at the end of the sequence's cache. An answer that takes another way makes them worthless.

    Args:
        may_verify: asked when there is a guess; after a no, nothing is looked up any more. None: nothing is guessed.
    """

    def __init__(self, may_verify: Callable[[], bool] | None, lengths: Lengths = GROWING) -> None:
        self._may_verify, self._lengths = may_verify, lengths
        self._lookup = None if may_verify is None else PromptLookup(lengths)
        self._ahead: deque[tuple[int, Known]] = deque()
        self._drafted, self._seconds = 0, 0.0

    def __len__(self) -> int:
        return len(self._ahead)

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens that were guessed, and those of them that were right and asked for."""
        if self._lookup is None:
            return 0, 0
        drafted, asked_for = (self._drafted, self._drafted - len(self._ahead)) if self._ahead else (0, 0)
        return self._lookup.drafted + drafted, self._lookup.accepted + asked_for

    def anew(self) -> Guesses[Known]:
        """For another prompt."""
        return Guesses(self._may_verify, self._lengths)

    def asked_for(self, tokens: list[int]) -> list[int]:
        """Those of the cache's tokens that are no mere guesses."""
        return tokens[: len(tokens) - len(self._ahead)] if self._ahead else tokens

    @property
    def looks_ahead(self) -> bool:
        """Whether there can be a guess: else nobody has to put the tokens together for `draft`."""
        return self._lookup is not None

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow these tokens, at most `most`; see `PromptLookup.draft`."""
        guess = self._lookup.draft(tokens, most) if self._lookup is not None else []
        if guess and self._may_verify is not None and not self._may_verify():
            self._lookup = None
            return []
        return guess

    def stepped(self, seconds: float) -> None:
        """A run of one token took so long."""
        if self._lookup is not None:
            self._lookup.stepped(seconds)

    def verified(self, guess: Sequence[int], known: Sequence[Known], seconds: float) -> None:
        """One run computed each of these tokens; what is known behind each gives the next one's logits."""
        self._ahead.extend(zip(guess, known, strict=True))
        self._drafted, self._seconds = len(guess), seconds

    def take(self, token: int | None) -> Known | None:
        """What is known behind a token that was chosen, if it is the one that was guessed."""
        if not self._ahead or self._ahead[0][0] != token:
            return None
        _, known = self._ahead.popleft()
        if not self._ahead:
            self._learn(self._drafted)
        return known

    def drop(self, tokens: list[int]) -> None:
        """Forget what nobody asked for, at the end of the cache's tokens too."""
        wrong = len(self._ahead)
        if wrong:
            self._learn(self._drafted - wrong)
            self._ahead.clear()
            del tokens[len(tokens) - wrong :]

    def _learn(self, accepted: int) -> None:
        if self._lookup is not None:
            self._lookup.learn(self._drafted, accepted, self._seconds)


def repeats_exactly(
    run: Callable[[list[int], int], NDArray[np.generic]], vocabulary: int, counts: Sequence[int]
) -> bool:
    """Whether a run of several tokens gives for each, bit for bit, what a run of that token alone gives.

    Args:
        run: computes tokens behind so many others, and gives an array [tokens, ...].
        counts: tokens of the runs that are compared with runs of one.
    """
    prompt = [token % vocabulary for token in range(1, 9)]
    tokens = [(7 * place + 3) % vocabulary for place in range(max(counts))]
    run(prompt, 0)
    singly = np.stack([np.array(run([token], len(prompt) + place)[0]) for place, token in enumerate(tokens)])
    return all(np.array_equal(run(tokens[:count], len(prompt)), singly[:count]) for count in counts)
