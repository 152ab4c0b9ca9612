"""A lock that the system holds: one export or package at a time writes to an output, one pull at a time to a model.

The file beside the output only carries the lock; a process that ends, however it ends, gives it back at that moment. A
process id in a file could not: two exports that find the id of a killed one would both take its place.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgephi.errors import EdgephiError, OutputError
from edgephi.files import is_link

_CONTENT = re.compile(rb"(?:edgephi (\d{1,10})\n)?")
_LOCKED_BYTE = 1 << 30
"""On Windows a locked byte cannot be read by others: one far behind the content."""


def export_is_running(holder: str, path: Path) -> EdgephiError:
    """The error for an output that another export is writing."""
    return OutputError(
        f"another export{holder} is writing this output",
        where=path,
        remedy="Wait until it ends, or choose another --output",
    )


@contextmanager
def locked(path: Path, held: Callable[[str, Path], EdgephiError] = export_is_running) -> Iterator[None]:
    """Hold the lock on a file, which is made and, at the end, removed; its folder exists.

    Args:
        held: makes the error for a lock that is held, of who holds it (`", process 12,"`, or nothing) and its path.

    Raises:
        EdgephiError: another process, or another thread of this one, holds it (`held`).
        OutputError: the file is something else than a lock; or the file system cannot lock.
        OSError: the file cannot be made.
    """
    descriptor = _acquire(path, held)
    try:
        yield
    finally:
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        if sys.platform != "win32":  # one that is removed while it is locked is never taken for the lock of a later one
            os.close(descriptor)


def _acquire(path: Path, held: Callable[[str, Path], EdgephiError]) -> int:
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
        flags |= getattr(os, name, 0)
    while True:
        if is_link(path):
            raise _no_lock("it is a link", path)
        descriptor = os.open(path, flags, 0o666)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise _no_lock("it is no regular file", path)
            if found.st_nlink > 1:
                raise _no_lock("it is a file that has another name too", path)
            content = _CONTENT.fullmatch(os.read(descriptor, 64))
            if content is None:
                raise _no_lock("it holds something else", path)
            if not _lock(descriptor, path):
                raise held(f", process {int(content[1])}," if content[1] else "", path)
            if _is_at(path, descriptor):
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.truncate(descriptor, 0)
                os.write(descriptor, f"edgephi {os.getpid()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it meanwhile; the next one to come makes it anew


def _lock(descriptor: int, path: Path) -> bool:
    """Take the lock; False: somebody else has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise OutputError(
            f"this file system cannot lock a file: {error.strerror or error}",
            where=path,
            remedy="Choose an --output on a disk of this machine, and copy the folder afterwards",
        ) from error
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    if sys.platform == "win32":
        return True
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)


def _no_lock(what: str, path: Path) -> OutputError:
    return OutputError(
        f"this file stands where edgephi keeps its lock, and {what}",
        where=path,
        remedy="Remove it, or choose another --output",
    )
