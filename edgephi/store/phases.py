"""How far a model is from answering, in states, bytes and seconds.

The time left is that of all phases together. A phase that has not begun counts with what it is expected to take, and
while it runs, what was measured replaces the expectation as it advances: the estimate does not jump when one begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from threading import RLock

MEASURED_AFTER_S = 1.0
"""A rate is measured no sooner."""


class ReadyState(StrEnum):
    """What a model is doing on the way to an answer."""

    NOT_INSTALLED = "not installed"
    DOWNLOADING = "downloading"
    EXPORTING = "exporting"
    COMPILING = "compiling"
    """For this device: the layers of an NPU's bundle, or a CPU's weights in the order its kernels read them."""
    READY = "ready"
    NOT_SUPPORTED = "not supported"


RATES = {ReadyState.EXPORTING: 150e6, ReadyState.COMPILING: 400e6}
"""Bytes of a checkpoint a second, expected before a phase began. Two cores export 280 MB/s where weights are rounded
(docs/results.md#memory-of-large-exports), and measuring the type of the KV cache reads them once more. Packing reads
the bundle, a third of them."""


@dataclass(frozen=True)
class Readiness:
    """A state with the reason for it, and how far the work is."""

    state: ReadyState
    reason: str | None = None
    """Why it is not installed or not supported; None: the state says it all."""
    done_bytes: int = 0
    """Of all phases together; never less than it was."""
    total_bytes: int | None = None
    """Of all phases together: a checkpoint that is downloaded counts again when it is exported. None: not known yet."""
    seconds_left: float | None = None
    """Of all phases together; None: there is no estimate yet."""
    phase_done_bytes: int = 0
    """Of the phase that `state` names."""
    phase_total_bytes: int | None = None

    @property
    def fraction(self) -> float:
        """Of the work, 0 to 1."""
        if self.state is ReadyState.READY:
            return 1.0
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0


class Stopped(BaseException):
    """The caller's `cancelled` said so. No Exception, so that what is interrupted keeps what it has, as on Ctrl-C."""


@dataclass
class Phase:
    """A part of the work."""

    state: ReadyState
    bytes: int | None = None
    """How much it counts among all phases; None: known when the first that reports tells."""

    @property
    def expected_s(self) -> float | None:
        """What it takes, as far as can be said before it begins; nothing can of a download."""
        rate = RATES.get(self.state)
        return None if rate is None or self.bytes is None else self.bytes / rate


class Meter:
    """Adds up phases, and tells the caller; any thread may report.

    Args:
        on_progress: told after every report.
        cancelled: asked at every report; True raises `Stopped` there.
        clock: seconds.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        on_progress: Callable[[Readiness], None] | None,
        cancelled: Callable[[], bool] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._phases, self._on_progress, self._cancelled, self._clock = list(phases), on_progress, cancelled, clock
        self._lock = RLock()
        self._index, self._began, self._first = -1, 0.0, 0.0
        self._fraction = 0.0
        self._done = 0

    def stop_if_cancelled(self) -> None:
        """Raises `Stopped` once the caller wants no more."""
        if self._cancelled is not None and self._cancelled():
            raise Stopped

    def plan(self, phases: Sequence[Phase]) -> None:
        """Replace the phases that there are by these, whose sizes are known now; before the first report of bytes."""
        with self._lock:
            self._phases = list(phases)

    def begin(self) -> None:
        """The next phase begins; the one before it is done."""
        with self._lock:
            if self._index >= 0:
                done = self._phases[self._index]
                done.bytes = done.bytes or 0
            self._index += 1
            self._began, self._fraction, self._first = self._clock(), 0.0, 0.0
        self.report(0, None)

    def report(self, done: int, total: int | None, state: ReadyState | None = None) -> None:
        """So much of this phase is done, in units of its own.

        Args:
            state: that it is in, where one phase has several.

        Raises:
            Stopped: the caller wants no more.
        """
        self.stop_if_cancelled()
        with self._lock:
            phase = self._phases[self._index]
            if total:
                for one in self._phases[self._index :]:
                    one.bytes = total if one.bytes is None else one.bytes
            fraction = max(self._fraction, min(1.0, done / total)) if total else self._fraction
            if not self._fraction and fraction:
                # what an earlier download left is there at once, and looking took time: neither tells the speed
                self._began, self._first = self._clock(), fraction
            self._fraction = fraction
            sizes = [one.bytes for one in self._phases]
            known = [size for size in sizes if size is not None]
            before = sum(known[: self._index])
            self._done = max(self._done, before + int((phase.bytes or 0) * fraction))
            readiness = Readiness(
                state or phase.state,
                done_bytes=self._done,
                total_bytes=sum(known) if len(known) == len(sizes) else None,
                seconds_left=self._seconds_left(),
                phase_done_bytes=done,
                phase_total_bytes=total,
            )
            if self._on_progress is not None:
                self._on_progress(readiness)

    def _seconds_left(self) -> float | None:
        current = self._phases[self._index]
        later = [one.expected_s for one in self._phases[self._index + 1 :]]
        expected = None if current.expected_s is None else current.expected_s * (1 - self._fraction)
        left = self._measured()
        if left is None:
            left = expected
        elif expected is not None:
            # of what a phase was expected to take nothing is left once half of it was measured
            weight = min(1.0, 2 * self._fraction)
            left = weight * left + (1 - weight) * expected
        if left is None or None in later:
            return None
        return left + sum(seconds for seconds in later if seconds is not None)

    def _measured(self) -> float | None:
        """Seconds left of this phase, by its rate since the first bytes; None: there is none yet."""
        elapsed, new = self._clock() - self._began, self._fraction - self._first
        if elapsed < MEASURED_AFTER_S or new <= 0:
            return None
        return elapsed * (1 - self._fraction) / new
