"""A child process that answers many requests, each within bounds of time and memory.

`child.call` is for one answer of a native library. This is for programs that strangers wrote, chat templates and
regular expressions, which are run again and again: the child stays, and is killed and started again when it exceeds a
bound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Literal

from edgephi.child import exit_reason, last_words
from edgephi.errors import DeviceError
from edgephi.frozen import child_command, child_environment
from edgephi.serving import GRACE

START_LIMIT = 60.0
"""Seconds an interpreter may take to start; 0.1 is usual, a virus scanner or a full machine takes more."""
_PERIOD = 0.05
_LONGEST_HEADER = 2**16
# where Python and its packages are, the time zone, and what Windows cannot do without
_ENVIRONMENT = frozenset(
    {"PATH", "HOME", "USERPROFILE", "APPDATA", "SYSTEMROOT", "WINDIR", "TZ", "TEMP", "TMP", "TMPDIR"}
)
_ENVIRONMENT |= {"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE"}
_ENVIRONMENT |= {"PYTHONPLATLIBDIR", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"}


class Exceeded(Exception):
    """The child took more than a bound allows and was killed."""

    def __init__(self, bound: Literal["time", "memory"]) -> None:
        super().__init__(bound)
        self.bound = bound


class ChildDied(Exception):
    """The child ended by itself while it worked on a request; the message is the reason in words."""


class BoundedChild:
    """One child process, started with the first request.

    Threads take turns. A process that was forked off this one gets a child of its own.

    Args:
        module: what to run; it calls `edgephi.serving.serve`.
        memory: bytes that it may use beyond what it has when it is ready.
        seconds: wall-clock time that one request may take at most.
    """

    def __init__(self, module: str, *, memory: int, seconds: float) -> None:
        self._module = module
        self._memory = memory
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., object] | None = None
        _everyone.add(self)

    def call(self, request: Mapping[str, object], *, seconds: float) -> tuple[dict[str, object], bytes]:
        """The answer to a request: its header and its bytes.

        Args:
            seconds: what it may take; neither waiting for other threads nor starting the child counts.

        Raises:
            Exceeded: it took too much time or memory. The next call starts another child.
            ChildDied: it ended while it worked on this.
            DeviceError: it does not start (step `process`).
        """
        limit = min(seconds, self._seconds)
        line = json.dumps({**request, "limit": limit}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            process = self._running()
            try:
                return self._exchange(process, line, limit)
            except _Lost as lost:
                self._stop()
                raise ChildDied(exit_reason(process.returncode)) from lost
            except BaseException:  # Ctrl-C too: an answer that nobody fetched would be taken for the next one
                self._stop()
                raise

    def close(self) -> None:
        """End the child; a later call starts another."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._process is None:
            self._start()
        assert self._process is not None
        return self._process

    def _start(self) -> None:
        arguments = [str(self._memory), str(self._seconds + GRACE)]
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                child_command(self._module, arguments, options=("-W", "ignore")),
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                bufsize=0,  # a forked process closes its copies, and must neither flush nor wait for a lock
                env=_environment() | child_environment(),
                cwd=Path(sys.executable).anchor,  # Windows keeps a folder that a process is in from being deleted
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise DeviceError(
                f"Python does not start: {error}", where=sys.executable, remedy="Repair this Python", step="process"
            ) from error
        self._process = process
        self._end = weakref.finalize(self, _end_process, process, os.getpid())
        try:
            self._exchange(process, b"", START_LIMIT)
        except (_Lost, Exceeded) as error:
            process.kill()
            status = process.wait()
            words = process.stderr.read(2**16) if process.stderr is not None else b""
            self._stop()
            if isinstance(error, Exceeded):
                what = f"it was not ready within {START_LIMIT:g} s"
            else:
                said = last_words(words or b"")
                what = f"it died while it started: {exit_reason(status)}" + (
                    f"; its last words: {said}" if said else ""
                )
            raise DeviceError(
                f"the child process for {self._module} does not start: {what}",
                remedy="Try again when the machine is idle; if that does not help, install edgephi again",
                step="process",
            ) from error
        except BaseException:
            self._stop()
            raise

    def _exchange(
        self, process: subprocess.Popen[bytes], line: bytes, seconds: float
    ) -> tuple[dict[str, object], bytes]:
        with _Watch(process, seconds, self._memory) as watch:
            try:
                assert process.stdin is not None and process.stdout is not None
                rest = memoryview(line)
                while rest:
                    rest = rest[process.stdin.write(rest) :]
                header, body = _answer(process.stdout.fileno())
            except (OSError, ValueError, KeyError, EOFError) as error:
                if watch.exceeded is not None:
                    raise Exceeded(watch.exceeded) from error
                raise _Lost from error
        if header.get("fault") == "memory":
            raise Exceeded("memory")
        return header, body

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _forget(self) -> None:
        """In a process that was just forked off: the child is the other one's, and a thread that held the lock is not
        here to give it back."""
        self._lock = threading.Lock()
        self._stop()


class _Lost(Exception):
    """The pipe ended or held something else than an answer."""


class _Watch:
    """Kills a process when it takes too long or, where the system does not bound its memory, too much of that."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float, memory: int) -> None:
        self._process = process
        self._end = monotonic() + seconds
        self._memory = memory
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="bounded child", daemon=True)
        self.exceeded: Literal["time", "memory"] | None = None

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        before = None if sys.platform == "linux" else _resident(self._process.pid)
        while (left := self._end - monotonic()) > 0:
            if self._done.wait(left if before is None else min(left, _PERIOD)):
                return
            if before is not None and _resident(self._process.pid) - before > self._memory:
                self.exceeded = "memory"
                break
        else:
            self.exceeded = "time"
        self._process.kill()


def _resident(pid: int) -> int:
    """Bytes of memory a process has; 0 when it is gone."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _answer(pipe: int) -> tuple[dict[str, object], bytes]:
    """One answer: a line of JSON, then as many bytes as its `size` says.

    Raises:
        OSError, ValueError, KeyError, EOFError: the pipe ended before, or this is no answer.
    """
    line, found, body = b"", b"", b""
    while not found and len(line) < _LONGEST_HEADER:
        piece = os.read(pipe, 2**16)
        if not piece:
            raise EOFError
        line, found, body = (line + piece).partition(b"\n")
    header = json.loads(line)
    pieces, missing = [body], int(header["size"]) - len(body)
    while missing > 0:
        pieces.append(os.read(pipe, min(missing, 2**20)))
        if not pieces[-1]:
            raise EOFError
        missing -= len(pieces[-1])
    return header, b"".join(pieces)


def _environment() -> dict[str, str]:
    """The environment variables a Python needs: what the user keeps in others is not a stranger's program's to know."""
    kept = {name: value for name, value in os.environ.items() if name.upper() in _ENVIRONMENT}
    folders = [str(Path(folder).absolute()) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    return {**kept, "PYTHONPATH": os.pathsep.join(folders)} if folders else kept


def _end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    if os.getpid() == owner:
        process.wait()


_everyone: weakref.WeakSet[BoundedChild] = weakref.WeakSet()


def _forget_all() -> None:
    for child in list(_everyone):
        child._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
