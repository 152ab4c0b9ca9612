"""The side of a `dask worker`: one cell, measured in a process of its own.

Answers are plain data, and so are refusals: a worker's exceptions need not be readable where the lab runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgephi.benchmarks.bench.assemble import bundle_facts
from edgephi.benchmarks.bench.lab.execute import MEASURE
from edgephi.benchmarks.report import library_versions
from edgephi.bundle import check_bundle, read_manifest
from edgephi.child import call
from edgephi.errors import BundleError, EdgephiError, UsageError

RUNTIME = ("edgephi", "onnxruntime", "onnxruntime-genai")
"""Libraries whose versions must be those of the lab's machine: a cell's name says which they are."""
LOOK_S = 1.0
"""Between two looks at whether the cell is still wanted."""

_one_at_a_time = threading.Lock()
_partial: dict[str, Path] = {}
"""Where the cell that is measured keeps what is known, by its name."""


def measure_cell(order: dict[str, Any]) -> dict[str, Any]:
    """Measure one cell on this worker.

    Args:
        order: name; arguments (of `execute.measure`, without bundle, workload and partial); bundle (its folder here)
            and its sha256; workload (files by path, the TOML file first); versions (of `RUNTIME`).

    Returns:
        `report`, or `reason` why there is none.
    """
    from distributed import get_worker

    worker = get_worker()
    key = str(worker.get_current_task())

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state == "executing" and worker.status.name in ("running", "paused")

    # a worker has one thread; should somebody give it more, the device is still measured for one cell at a time
    with _one_at_a_time, TemporaryDirectory(prefix="edgephi-lab-") as scratch:
        try:
            folder = _checked_bundle(order["bundle"], order["sha256"])
            _check_versions(order["versions"])
            workload = _written(order["workload"], Path(scratch))
            _partial[order["name"]] = partial = Path(scratch) / "partial.json"
            with _ended_unless(wanted):
                arguments = {**order["arguments"], "bundle": str(folder), "workload": str(workload)}
                arguments["partial"] = str(partial)
                return {"report": call(MEASURE, arguments, timeout_s=None, where=order["arguments"]["label"])}
        except EdgephiError as error:
            return {"reason": f"worker {worker.name}: {error}"}
        except OSError as error:
            return {"reason": f"worker {worker.name}: its temporary folder cannot be used: {error.strerror or error}"}
        finally:
            _partial.pop(order["name"], None)


def unfinished() -> dict[str, str]:
    """What is known of the cell that is measured here: its report as JSON, by the cell's name."""
    found = {}
    for name, file in list(_partial.items()):
        with suppress(OSError):  # nothing is known yet, or the cell ended in between
            found[name] = file.read_text(encoding="utf-8")
    return found


def _checked_bundle(folder: str, sha256: str) -> Path:
    path = Path(folder)
    manifest = read_manifest(path)
    if bundle_facts(path, manifest).sha256 != sha256:
        raise BundleError("this is another bundle than the lab's", where=path, remedy="Copy the lab's bundle here")
    check_bundle(path, manifest, every_byte=True)
    return path


def _check_versions(expected: dict[str, str]) -> None:
    here = library_versions(*RUNTIME)
    differ = [f"{name} {here.get(name, 'missing')} instead of {expected.get(name)}" for name in RUNTIME]
    differ = [words for name, words in zip(RUNTIME, differ, strict=True) if here.get(name) != expected.get(name)]
    if differ:
        raise UsageError(
            f"it has other versions than the lab: {', '.join(differ)}", remedy="Install the same on both machines"
        )


def _written(files: dict[str, bytes], folder: Path) -> Path:
    paths = [folder / "workload" / name for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return paths[0]


@contextmanager
def _ended_unless(wanted: Callable[[], bool]) -> Iterator[None]:
    """While the block runs: kill the measuring process when the lab was interrupted, or the scheduler went away."""
    import psutil

    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            if wanted():
                continue
            for child in psutil.Process(os.getpid()).children():
                with suppress(psutil.Error):
                    if MEASURE in child.cmdline():
                        child.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
