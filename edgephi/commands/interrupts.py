"""Ctrl-C and SIGTERM become exceptions, so that what is unfinished is tidied up on the way out."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses, as shells give them: 128 and the number of the signal."""
_AGAIN_S = 0.02


class Terminated(BaseException):
    """SIGTERM. No Exception, so that nobody on the way takes it for a fault of his own."""


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM Terminated; afterwards signals do what they did before.

    A signal that the process was told to ignore stays ignored.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN and handler is not None:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN and handler is not None:
                signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    if _imports(frame):
        # NumPy and others print what breaks their import, and raise an ImportError: the signal comes again afterwards
        again = threading.Timer(_AGAIN_S, _thread.interrupt_main, (number,))
        again.daemon = True
        again.start()
        return
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
