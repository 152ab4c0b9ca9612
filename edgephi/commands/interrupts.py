"""Ctrl-C and SIGTERM, from the first line of the program to its last. Imports nothing that takes time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses, as shells give them: 128 and the number of the signal."""


class Terminated(BaseException):
    """SIGTERM. No Exception, so that nobody on the way takes it for a fault of his own; files are tidied up."""


def end_at_once_on_ctrl_c() -> None:
    """For the time of imports and of the end of the program, where an exception would come out as a traceback.

    A process that was told to ignore Ctrl-C goes on doing so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM Terminated; afterwards signals do what they did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if before[signal.SIGTERM] is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
