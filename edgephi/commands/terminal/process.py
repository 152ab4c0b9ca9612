"""What the program runs in: standard input and output (closed, full, with a reader that goes away, in any code page),
and Ctrl-C and SIGTERM, which become exceptions, so that what is unfinished is tidied up on the way out."""

from __future__ import annotations

import _thread
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import BinaryIO, TextIO

from edgephi.errors import OutputError
from edgephi.tokenizer.bounds import hide_panics


class ReaderGone(OutputError):
    """Whoever read standard output went away, as `head` does when it has seen enough: nothing to tell anybody."""


class _Stream(io.TextIOWrapper):
    """Standard output or error; what a legacy code page lacks is shown as `?`."""

    required = True
    """Whether text that nobody takes is an error. Messages are not: the exit status remains."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._refused(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._refused(error)

    def _refused(self, error: OSError) -> None:
        # what is still in the buffer would be refused once more when the interpreter ends
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        if self.required:
            # Windows says EINVAL
            gone = error.errno in (errno.EPIPE, errno.EINVAL)
            if gone:
                raise ReaderGone("the reader of standard output went away", remedy="Read all of it") from error
            what = f"standard output takes no more: {error.strerror or error}"
            raise OutputError(what, remedy="Free disk space, or send the output elsewhere") from error


def guard_streams() -> None:
    """Make the three standard streams usable, whatever the caller left of them.

    Raises:
        OutputError: standard output is closed.
    """
    for descriptor in (0, 1, 2):  # a closed one would be given to the next file that is opened, and printed into
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != descriptor:
                    os.dup2(nowhere, descriptor)
                    os.close(nowhere)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - as long as the program
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    if sys.stdout is None:
        raise OutputError("standard output is closed", remedy="Leave it open, or send it to a file")
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr, required=False)
    hide_panics()
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _guarded(stream: TextIO, *, required: bool = True) -> TextIO:
    """The same stream, guarded; one that somebody else made (a test, a notebook) stays what it is."""
    if type(stream) is not io.TextIOWrapper:
        return stream
    encoding, by_line = stream.encoding, stream.line_buffering
    with suppress(OSError):
        stream.flush()
    buffer: BinaryIO = stream.detach()
    if required and not buffer.isatty() and buffer.fileno() == 1:
        # native libraries print there too: what they say goes to standard error, and results stay alone
        buffer = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
    guarded = _Stream(buffer, encoding=encoding, errors="replace", line_buffering=by_line)
    guarded.required = required
    return guarded


INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses, as shells give them: 128 and the number of the signal."""
_AGAIN_S = 0.02


class Terminated(BaseException):
    """SIGTERM. No Exception, so that nobody on the way takes it for a fault of his own."""


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM Terminated; afterwards signals do what they did before.

    A signal that the process was told to ignore stays ignored. One that strikes inside of a destructor or of a callback
    of the garbage collector, whose exceptions Python only prints, comes again.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN and handler is not None:
            signal.signal(number, _raise)
    hook = sys.unraisablehook

    def struck_again(swallowed: sys.UnraisableHookArgs) -> None:
        if isinstance(swallowed.exc_value, KeyboardInterrupt | Terminated):
            _send_again(signal.SIGINT if isinstance(swallowed.exc_value, KeyboardInterrupt) else signal.SIGTERM)
        else:
            hook(swallowed)

    sys.unraisablehook = struck_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if handler is not signal.SIG_IGN and handler is not None:
                signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    if _imports(frame):
        # NumPy and others print what breaks their import, and raise an ImportError: the signal comes again afterwards
        _send_again(number)
        return
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _send_again(number: int) -> None:
    again = threading.Timer(_AGAIN_S, _thread.interrupt_main, (number,))
    again.daemon = True
    again.start()


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
