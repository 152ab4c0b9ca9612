"""A copy of a folder whose configuration this onnxruntime-genai can read."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgephi.bundle import GENAI_CONFIG, MANIFEST
from edgephi.errors import BundleError, OutputError
from edgephi.files import require_inside, unreadable
from edgephi.runtime.foreign.diagnosis import Diagnosis, diagnose

MOST_FILES = 10_000
DEEPEST = 16
RESERVE = 64 * 2**20
"""Disk left free for everything else on the machine."""
REMEDY = "Copy the folder without it, and run `edgephi doctor` on that"


def examine(folder: Path, output: Path | None) -> tuple[Diagnosis, tuple[str, ...] | None]:
    """Diagnose a folder and, with an output, write a repaired copy; the diagnosis is then the copy's.

    Returns:
        The diagnosis, and the keys that were taken out (None: no copy was asked for).

    Raises:
        BundleError, OutputError: as `diagnose` and `write_repaired`.
    """
    diagnosis = diagnose(folder)
    if output is None:
        return diagnosis, None
    write_repaired(folder, output, diagnosis)
    return diagnose(output), diagnosis.unknown


def write_repaired(folder: Path, output: Path, diagnosis: Diagnosis) -> None:
    """Copy a folder, with the configuration's unknown keys taken out. The original is not touched.

    A link to a file of the same folder becomes a file of the copy; a link to anything else is an error. The copy is
    written beside its place, under a name that nobody can foresee, and renamed at the end.

    Raises:
        BundleError: there is nothing to take out, taking out would not help, it is a bundle of edgephi's own, or it
            holds a link that leaves it, a link to a folder, or something else than files and folders.
        OutputError: the output exists, lies inside the folder, or cannot be written.
    """
    if not diagnosis.problems:
        raise BundleError(
            "nothing is wrong with this folder, so --fix has nothing to take out",
            where=folder,
            remedy="Use it as it is",
        )
    if diagnosis.repaired is None:
        raise BundleError(
            "no key of the configuration can be taken out to make this folder readable",
            where=folder,
            remedy="See what `edgephi doctor` says about it",
        )
    if (folder / MANIFEST).exists():
        raise BundleError("this is a bundle with a manifest", where=folder, remedy="Export the model again")
    if output.exists() or output.is_symlink():
        raise OutputError("the output exists", where=output, remedy="Name a folder that does not exist")
    if output.resolve().is_relative_to(folder.resolve()):
        raise OutputError("the output lies inside the folder it copies", where=output, remedy="Name another place")
    files: dict[Path, int] = {}
    for path, size in _files(folder, folder, 0):
        files[path] = size
        if len(files) > MOST_FILES:
            raise BundleError(f"the folder holds more than {MOST_FILES:,} files", where=folder, remedy=REMEDY)
    needed = sum(files.values()) + RESERVE
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < needed:
            what = f"the copy needs {needed:,} bytes, {free:,} are free"
            raise OutputError(what, where=output, remedy="Make room or name another disk")
        scratch = Path(tempfile.mkdtemp(prefix=".edgephi-", suffix=".partial", dir=output.parent))
        try:
            partial = scratch / "copy"
            partial.mkdir()
            for path, size in files.items():
                _copy(path, partial / path.relative_to(folder), size)
            (partial / GENAI_CONFIG).write_text(diagnosis.repaired + "\n", encoding="utf-8")
            partial.rename(output)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"the copy cannot be written: {error.strerror or error}", where=output, remedy="Name another place"
        ) from error


def _files(below: Path, folder: Path, depth: int) -> Iterator[tuple[Path, int]]:
    """(path, bytes) of every file below a folder.

    Raises:
        BundleError: as `write_repaired`; or there are more files than any model has.
    """
    if depth > DEEPEST:
        raise BundleError("the folder is nested too deeply", where=below, remedy=REMEDY)
    try:
        with os.scandir(below) as listing:
            entries = list(listing)
        for entry in entries:
            path = Path(entry.path)
            if entry.is_symlink():
                require_inside(path, folder, BundleError, REMEDY)
            if entry.is_dir():
                if path.resolve() != below.resolve() / entry.name:  # a junction of Windows is no symlink
                    raise BundleError("this is a link to a folder, which is not copied", where=path, remedy=REMEDY)
                yield from _files(path, folder, depth + 1)
                continue
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):
                raise BundleError("this is neither a file nor a folder", where=path, remedy=REMEDY)
            yield path, facts.st_size
    except OSError as error:
        raise unreadable(error, below, BundleError, REMEDY) from error


def _copy(source: Path, target: Path, size: int) -> None:
    """Copy a file of `size` bytes; one that grew meanwhile is no reason to fill the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reading, target.open("xb") as writing:
        while size and (piece := reading.read(min(size, 4 * 2**20))):
            writing.write(piece)
            size -= len(piece)
