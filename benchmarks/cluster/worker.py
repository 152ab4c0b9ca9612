"""The side of a `dask worker`: a function in a process of its own, ended when nobody wants its answer any more.

Answers are plain data, and so are refusals: a worker's exceptions need not be readable where the command runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgephi.benchmarks.report import library_versions
from edgephi.bundle import check_bundle, contents_sha256, read_manifest
from edgephi.child import call
from edgephi.errors import BundleError, EdgephiError, UsageError

RUNTIME = ("edgephi", "onnxruntime", "onnxruntime-genai")
"""Libraries whose versions must be those of the machine that asks."""
LOOK_S = 1.0
"""Between two looks at whether the answer is still wanted."""

_one_at_a_time = threading.Lock()


def answer(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, or `reason` why it failed. A machine is busy with one job at a time."""
    from distributed import get_worker

    worker = get_worker()
    # a worker has one thread; should somebody give it more, jobs still do not disturb each other
    with _one_at_a_time:
        try:
            return work()
        except EdgephiError as error:
            return {"reason": f"worker {worker.name}: {error}"}
        except OSError as error:
            return {"reason": f"worker {worker.name}: its temporary folder cannot be used: {error.strerror or error}"}


def in_child(function: str, arguments: dict[str, Any], where: str) -> object:
    """Call a function in a process of its own (`edgephi.child.call`), which is killed when the job was cancelled or the
    scheduler went away.

    Raises:
        EdgephiError: as `call`.
    """
    from distributed import get_worker

    worker = get_worker()
    key = str(worker.get_current_task())

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state == "executing" and worker.status.name in ("running", "paused")

    with _ended_unless(wanted, function):
        return call(function, arguments, timeout_s=None, where=where)


def checked_bundle(folder: str, sha256: str) -> Path:
    """The folder, once every byte of it is that of the bundle that was meant.

    Raises:
        BundleError: it is missing, damaged or another one.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if contents_sha256(manifest) != sha256:
        raise BundleError(
            "this is another bundle than the one that was asked for", where=path, remedy="Copy that one here"
        )
    check_bundle(path, manifest, every_byte=True)
    return path


def check_versions(expected: dict[str, str]) -> None:
    """
    Raises:
        UsageError: a library has another version here.
    """
    here = library_versions(*RUNTIME)
    differ = [f"{name} {here.get(name, 'missing')} instead of {expected.get(name)}" for name in RUNTIME]
    differ = [words for name, words in zip(RUNTIME, differ, strict=True) if here.get(name) != expected.get(name)]
    if differ:
        raise UsageError(
            f"it has other versions than the machine that asks: {', '.join(differ)}",
            remedy="Install the same on both machines",
        )


@contextmanager
def _ended_unless(wanted: Callable[[], bool], function: str) -> Iterator[None]:
    """While the block runs: kill the process of this function when nobody wants its answer."""
    import psutil

    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            if wanted():
                continue
            for child in psutil.Process(os.getpid()).children():
                with suppress(psutil.Error):
                    if function in child.cmdline():
                        child.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
