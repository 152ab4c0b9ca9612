"""How long a run may take, why it stopped, and how much time is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from edgephi.benchmarks.bench.cases import Case
from edgephi.benchmarks.bench.workload import Method

INTERRUPTED = "interrupted"


@dataclass
class Pace:
    """The time budget of a run. The first run that begins after it has been used up is not begun.

    `within` turns Ctrl-C and the end of the budget into `stopped`, so that what was measured can be kept.
    """

    budget_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    stopped: str | None = None
    """Why the run ended early."""
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def check(self) -> None:
        """Called before every run that can be left out."""
        if self.budget_s is not None and self.clock() - self.started >= self.budget_s:
            raise _BudgetUsedUp

    @contextmanager
    def within(self) -> Iterator[None]:
        """Ctrl-C or the end of the budget ends the block, and `stopped` says which."""
        try:
            yield
        except KeyboardInterrupt:
            self.stopped = INTERRUPTED
        except _BudgetUsedUp:
            self.stopped = f"the time budget of {self.budget_s:g} s was used up"


class _BudgetUsedUp(Exception):
    """Only `Pace.within` sees it."""


@dataclass
class _Planned:
    """Runs of a case that are still to come, and what those that were took."""

    prompt_tokens: int
    new_tokens: int
    left: int
    seconds: list[float] = field(default_factory=list)


class TimeLeft:
    """Seconds until the last run, from what the runs so far took.

    A case that ran takes as long as it did on average. One that did not takes the time of its tokens, a prompt's and
    new ones, at the slowest rate that was seen: a long context makes tokens slower, and an estimate should not grow.
    Warm-ups begin with the case that has most to do, so that this rate is known early.
    """

    def __init__(self, cases: Sequence[Case], method: Method) -> None:
        self._pause_s = method.pause_s
        self._planned = [
            _Planned(len(case.depth_ids) + len(case.prompt_ids), case.new_tokens, method.warmups + method.repetitions)
            for case in cases
        ]
        self._prompt_s = 0.0
        """Of a prompt's token, at worst."""
        self._new_s = 0.0
        self.afterwards_s = 0.0
        """What comes after the last run."""

    def ran(self, index: int, seconds: float, new_s: float) -> None:
        """A run of a case is done, with all its repeated attempts.

        Args:
            seconds: it took in all, pauses apart.
            new_s: of these, between new tokens.
        """
        one = self._planned[index]
        one.left -= 1
        one.seconds.append(seconds)
        if one.new_tokens > 1:
            self._new_s = max(self._new_s, new_s / (one.new_tokens - 1))
        self._prompt_s = max(self._prompt_s, max(0.0, seconds - new_s) / max(1, one.prompt_tokens))

    def seconds(self) -> float | None:
        """None before the first run."""
        if not any(one.seconds for one in self._planned):
            return None
        return self.afterwards_s + sum(one.left * (self._each(one) + self._pause_s) for one in self._planned)

    def _each(self, one: _Planned) -> float:
        if one.seconds:
            return sum(one.seconds) / len(one.seconds)
        return one.prompt_tokens * self._prompt_s + one.new_tokens * self._new_s
