"""Who computes when several threads ask one model: one of them at a time, for itself and for all that wait.

No thread runs in the background. Whoever asks and finds nobody computing computes, first come first served; single
tokens of several sequences, which are cheap together, are taken in one go. So a caller waits for at most one piece of
somebody else's prompt, and a lone caller pays nothing.

Ctrl-C ends one thread's waiting or computing, at any place, and so does whatever else a signal handler raises. What it
was computing for others one of them computes again, so all work must bear being done twice.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from traceback import walk_tb
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Made = TypeVar("Made")

WAIT_S, WAIT_SHARE = 0.002, 0.25
"""How long a step waits for those that took part in the last one: seconds, and as a share of what the last one took. A
thread needs about 0.1 ms to come back for its next token; one that does not come is not waited for again."""


@dataclass(eq=False)
class _Job(Generic[Item, Result]):
    alone: Callable[[], object] | None = None
    """Computed by itself; None: a step of `item`."""
    item: Item | None = None
    done: bool = False
    result: object = None
    error: Exception | None = None


@dataclass
class Statistics:
    """What was computed since the model was loaded."""

    steps: int = 0
    """Runs of single tokens."""
    stepped: int = 0
    """Tokens they computed; over `steps`, the mean size of a batch."""
    pieces: int = 0
    """Everything else: pieces of prompts, copies of caches."""
    sizes: dict[int, int] = field(default_factory=dict)
    """Steps by the number of their sequences."""


def interrupt_behind(error: RuntimeError) -> BaseException:
    """Ctrl-C in the moment in which a condition's `wait` has given its lock away: leaving the lock then fails."""
    struck = error.__context__
    return error if struck is None or isinstance(struck, Exception) else struck


def raised_by_handler(error: BaseException) -> bool:
    """Whether a signal handler raised it, which Python runs in the main thread between two steps of whatever is
    computed there: a function that is a handler now is in its traceback, or in that of what caused it."""
    if threading.current_thread() is not threading.main_thread():
        return False
    codes = set()
    for number in signal.valid_signals():
        with suppress(ValueError):  # Windows lists some that it does not have
            handler = signal.getsignal(number)
            codes.add(getattr(getattr(handler, "__func__", handler), "__code__", None))
    codes.discard(None)
    problem: BaseException | None = error
    while problem is not None:
        if any(frame.f_code in codes for frame, _ in walk_tb(problem.__traceback__)):
            return True
        problem = problem.__cause__
    return False


class Scheduler(Generic[Item, Result]):
    """The order of one model's work.

    Args:
        step: computes one token for each of several items; at most `most` at once, no item twice.
    """

    def __init__(self, step: Callable[[Sequence[Item]], Sequence[Result]], most: int) -> None:
        self._step, self._most = step, most
        self._lock = threading.RLock()
        """Entered instead of the condition: Ctrl-C can strike inside of a condition's `__enter__`, and not of this."""
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[_Job[Item, Result]] = deque()
        self._leader: _Job[Item, Result] | None = None
        """Of the thread that computes."""
        self._expected: set[Item] = set()
        self._last_s = 0.0
        self.statistics = Statistics()

    def alone(self, work: Callable[[], Made]) -> Made:
        """Run a function while nothing else is computed, in some caller's thread.

        Raises:
            Exception: what the function raises.
        """
        return self._submit(_Job(alone=work))  # type: ignore[return-value]  # what `work` returns

    def step(self, item: Item) -> Result:
        """The item's next token, in one run with those of others that ask at the same time.

        Raises:
            Exception: what the step raises, to all that took part.
        """
        return self._submit(_Job(item=item))  # type: ignore[return-value]  # what `_step` returns

    def leave(self, item: Item) -> None:
        """No further step waits for this item."""
        with self._lock:
            self._expected.discard(item)
            self._changed.notify_all()

    def is_shared_with_others_than(self, item: Item) -> bool:
        """Whether somebody else computes, or has lately taken part in a step."""
        with self._lock:
            return bool(self._waiting) or self._leader is not None or bool(self._expected - {item})

    def _submit(self, job: _Job[Item, Result]) -> object:
        try:
            with self._lock:
                self._waiting.append(job)
                self._changed.notify_all()
                while self._leader is not None and not job.done:
                    self._changed.wait()
                if not job.done:
                    self._leader = job
            while not job.done:
                self._compute(self._next())
        except RuntimeError as error:
            raise interrupt_behind(error) from None
        finally:
            struck: BaseException | None = None
            while True:
                try:
                    with self._lock:
                        if job in self._waiting:  # Ctrl-C: nobody will read the result
                            self._waiting.remove(job)
                        if self._leader is job:
                            self._changed.notify_all()
                            self._leader = None
                    break
                except BaseException as error:  # Ctrl-C in here: the others would wait for ever
                    struck = error
            if struck is not None:
                raise struck
        if job.error is not None:
            raise job.error
        return job.result

    def _next(self) -> list[_Job[Item, Result]]:
        """The jobs to compute now; there is at least one. They wait on until they are done."""
        with self._lock:
            self._drop_done()  # Ctrl-C may have struck before that
            if self._waiting[0].alone is not None:
                return [self._waiting[0]]
            deadline = perf_counter() + max(WAIT_S, WAIT_SHARE * self._last_s)
            while True:
                steps = [job for job in self._waiting if job.alone is None]
                left = deadline - perf_counter()
                missing = self._expected.difference(job.item for job in steps)
                if not missing or len(steps) < len(self._waiting) or left <= 0:
                    break
                self._changed.wait(left)
            chosen = steps[: self._most]
            self._expected = {job.item for job in chosen if job.item is not None}
            return chosen

    def _compute(self, jobs: list[_Job[Item, Result]]) -> None:
        started = perf_counter()
        try:
            if jobs[0].alone is not None:
                self.statistics.pieces += 1
                results: Sequence[object] = [jobs[0].alone()]
            else:
                items = [job.item for job in jobs if job.item is not None]
                results = self._step(items)
                self.statistics.steps += 1
                self.statistics.stepped += len(items)
                self.statistics.sizes[len(items)] = self.statistics.sizes.get(len(items), 0) + 1
                self._last_s = perf_counter() - started
        except Exception as error:
            if raised_by_handler(error):
                raise
            with self._lock:
                for job in jobs:
                    job.error, job.done = error, True
                self._drop_done()
                self._changed.notify_all()
        else:
            with self._lock:
                for job, result in zip(jobs, results, strict=True):
                    job.result, job.done = result, True
                self._drop_done()
                self._changed.notify_all()

    def _drop_done(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.done)
