"""The child's side of `BoundedChild`: requests are read, bounds kept and answers written.

A request is a line of JSON; `limit` in it is the time it may take. An answer is a line of JSON and as many bytes as its
`size` says; `seconds` is the time it took. Before the first request the process gives up what a stranger's program has
no use for: on POSIX it can neither open a file or a socket nor start a process.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import BinaryIO, NoReturn

from edgephi.child import standard_streams

Answer = tuple[dict[str, object], bytes]
"""A header and a body."""
GRACE = 2.0
"""Seconds after which the child ends itself when nobody has killed it at its limit."""


def serve(start: Callable[[], Callable[[dict[str, object]], Answer]]) -> NoReturn:
    """Answer requests until the parent closes the pipe or ends.

    The command line says how many bytes of memory and how many seconds a request may take at most.

    Args:
        start: imports what is needed while files can still be opened, and returns what makes the answers.
    """
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    stdin, stdout = standard_streams()
    with suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends an answer of the model, not this process
    answer = start()
    lines = requests(stdin)
    # nobody reads what is said from here on, and a full pipe would stop this process
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    limit_memory(memory)
    give_up_rights()
    send(stdout, {"ready": True}, b"")
    while True:
        request = json.loads(lines.get())
        limit = request.pop("limit", None)
        alarm(seconds if limit is None else min(seconds, float(limit) + GRACE))
        started = monotonic()
        header, body = answer(request)
        del request
        alarm(0)
        send(stdout, {**header, "seconds": monotonic() - started}, body)
        del body


def limit_memory(extra: int) -> None:
    """Allow `extra` bytes of address space beyond what is in use (Linux; elsewhere the parent watches)."""
    if sys.platform != "linux":
        return
    import resource

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + extra if hard == resource.RLIM_INFINITY else min(used + extra, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def give_up_rights() -> None:
    """No file or socket can be opened from here on, and no process started (POSIX)."""
    if sys.platform == "win32":
        return
    import resource

    for kind in ("RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_NOFILE"):
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, kind), (0, 0))


def requests(stream: BinaryIO) -> queue.SimpleQueue[bytes]:
    """Lines as they come, read by a thread; it ends this process with the stream, whatever that is at."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        while line := stream.readline():
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def alarm(seconds: float) -> None:
    """Have the system end this process after so long, should the parent no longer be there to do it (POSIX).

    Python's own threads do not run while a long multiplication or a library does; this does not need them.
    """
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)


def send(stream: BinaryIO, header: Mapping[str, object], body: bytes) -> None:
    """Write an answer; without a reader there is nothing left to do."""
    try:
        line = json.dumps({**header, "size": len(body)}).encode()
        stream.write(line + b"\n")
        stream.write(body)
        stream.flush()
    except OSError:
        os._exit(0)
