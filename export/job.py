"""An export while it runs: the folder it writes to, its journal, its progress, and the hashes of the source.

Every exporter runs inside one of these: its own graphs (`export/pipeline.py`), an NPU's (`export/npu/pipeline.py`),
and those that optimum traces (`export/optimum/export.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from uuid import uuid4

import edgephi
from edgephi.bundle import FileEntry, Manifest, describe_file, write_manifest
from edgephi.export.journal import Journal
from edgephi.export.options import ExportOptions, ExportPhase, Progress
from edgephi.export.output import check_disk, staged
from edgephi.export.spec import Checkpoint


class Job:
    """What an exporter works with; `start_job` makes it and puts the folder in its place at the end."""

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        source_files: Callable[[], tuple[FileEntry, ...]],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.folder = folder
        """What is in it at the end is the bundle, but for the journal."""
        self.journal = journal
        self.source_files = source_files
        """The source's files with their hashes; waits until they are hashed."""
        self.threads = min(4, os.cpu_count() or 1)
        self._on_progress = on_progress
        self._total, self._done, self._lock = 0, 0, Lock()
        self._phase: ExportPhase = "exporting"
        self._method = ""
        self._seconds: float | None = None

    def expect(self, total: int, method: str = "", seconds: float | None = None) -> None:
        """Say how many bytes of the source there are to report, before the first is.

        Args:
            total: these bytes.
            method, seconds: see `Progress`.
        """
        self._total, self._method, self._seconds = total, method, seconds
        if seconds is not None:
            self.report(0)

    def report(self, count: int) -> None:
        """Add bytes of the source that are done, from any thread, and tell the caller of the export."""
        if self._on_progress is None:
            return
        with self._lock:
            self._done += count
            self._on_progress(Progress(self._done, self._total, self._phase, self._method, self._seconds))

    def begin(self, phase: ExportPhase) -> None:
        """Say what the work is from here on."""
        self._phase = phase
        self.report(0)

    def part(self, total: int) -> Callable[[int, int], None]:
        """What work of this size reports to: how many of how many equal pieces are done."""
        told = 0

        def report(done: int, pieces: int) -> None:
            nonlocal told
            now = total * done // pieces
            self.report(now - told)
            told = now

        return report

    def finish(self, manifest: Manifest) -> Manifest:
        """Write edgephi.json, the last file of a bundle, and return what is in it."""
        write_manifest(self.folder, manifest)
        return manifest


@contextmanager
def start_job(
    options: ExportOptions,
    checkpoint: Checkpoint,
    *,
    bytes_needed: int,
    key: str | None = None,
    keeps: Sequence[str] = (),
) -> Iterator[Job]:
    """Begin an export; its output folder appears when the block ends well.

    Args:
        bytes_needed: what the bundle, and what lies beside it meanwhile, takes on the disk.
        key: of everything that decides the bytes (`resume_key`): an export that was interrupted goes on under the same
            one. None: this export always starts anew.
        keeps: files and folders, at the top, that going on needs, beside those that the journal vouches for.

    Raises:
        OutputError: the disk is too small, or `staged` refuses the folder.
    """
    output = options.output_folder
    check_disk(output, bytes_needed)
    with (
        staged(output, options.force, key or uuid4().hex, keeps.__contains__) as (folder, journal),
        _source_hashes(checkpoint.files) as source_files,
    ):
        yield Job(folder, journal, source_files, options.on_progress)


def resume_key(checkpoint: Checkpoint, *facts: object) -> str:
    """Of everything that decides the bytes of the data file, in values that JSON holds."""
    stats = [(file.name, file.stat()) for file in checkpoint.files]
    source = [
        edgephi.__version__,
        checkpoint.kind,
        checkpoint.name,
        checkpoint.revision,
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
    ]
    return hashlib.sha256(json.dumps([*source, *facts], sort_keys=True).encode()).hexdigest()


@contextmanager
def _source_hashes(files: tuple[Path, ...]) -> Iterator[Callable[[], tuple[FileEntry, ...]]]:
    """Hash the source files in a thread of their own; yields a function that waits for the result."""
    leaving = Event()

    def stop_early(count: int) -> None:
        if leaving.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1, thread_name_prefix="edgephi-hash") as pool:
        hashed = pool.submit(lambda: tuple(describe_file(file.parent, file.name, stop_early) for file in files))
        try:
            yield hashed.result
        finally:
            leaving.set()
