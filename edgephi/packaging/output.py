"""Where a package is written: beside its place, from which it is renamed when all of it is there.

The folder beside it has a name that can be foretold, so it may be anybody's: it is cleared only if it is one of ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgephi.bundle import MANIFEST
from edgephi.errors import OutputError
from edgephi.files import is_link, unwritable
from edgephi.lock import locked

BILL, REQUIREMENTS, PROGRAM, README = "sbom.cdx.json", "requirements.txt", "program.py", "README.md"
LICENCES, MODEL, WHEELS = "licences", "model", "wheels"
_PARTS = {BILL, REQUIREMENTS, PROGRAM, README, LICENCES, MODEL, WHEELS}
_NEW, _OLD = "new", "old"
RESERVE = 64 * 2**20
"""Disk left free for everything else on the machine."""


@contextmanager
def staged(output: Path, bundle: Path, force: bool, needed: int) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends well, and goes away otherwise.

    What a call for the same output left that was killed goes first; a package it had moved aside comes back.

    Args:
        bundle: what is packaged, which the output may neither hold nor lie in.
        force: replace a package that is there.
        needed: bytes that have to be free.

    Raises:
        OutputError: the output exists, cannot be written, or is being written by another process.
    """
    try:
        output = output.absolute()
        _check_output(output, bundle, force)
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = output.parent / f".{output.name}.package"
        with locked(output.parent / f".{output.name}.lock", _is_written):
            _clear(scratch, output)
            _check_output(output, bundle, force)
            free = shutil.disk_usage(output.parent).free
            if free < needed + RESERVE:
                raise OutputError(
                    f"the bundle takes {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free",
                    where=output.parent,
                    remedy="Free disk space, or choose an --output on another disk",
                )
            try:
                (scratch / _NEW).mkdir(parents=True)
                yield scratch / _NEW
                _check_output(output, bundle, force)
                if output.exists():
                    output.rename(scratch / _OLD)
                (scratch / _NEW).rename(output)
            finally:
                with suppress(OSError, OutputError):
                    _clear(scratch, output)
    except OSError as error:
        raise unwritable(error, output, "Check the folder and the disk, or choose another --output") from error


def _is_written(holder: str, path: Path) -> OutputError:
    return OutputError(
        f"another call{holder} is writing this output",
        where=path,
        remedy="Wait until it ends, or choose another --output",
    )


def _clear(scratch: Path, output: Path) -> None:
    """Remove the folder beside the output; a package that was moved into it goes back if nothing took its place."""
    if not os.path.lexists(scratch):
        return
    if not _is_ours(scratch):
        raise OutputError(
            "this stands where a package is written before it takes its place, and is none",
            where=scratch,
            remedy="Move it away, or choose another --output",
        )
    if (scratch / _OLD).is_dir() and not os.path.lexists(output):
        (scratch / _OLD).rename(output)
    shutil.rmtree(scratch)


def _is_ours(scratch: Path) -> bool:
    """Whether a call of `staged` made it: it holds nothing but a package that is begun and one that is replaced."""
    if is_link(scratch) or not scratch.is_dir():
        return False
    inside = list(scratch.iterdir())
    if any(entry.name not in (_NEW, _OLD) or is_link(entry) or not entry.is_dir() for entry in inside):
        return False
    begun, replaced = scratch / _NEW, scratch / _OLD
    if begun.exists() and not {entry.name for entry in begun.iterdir()} <= _PARTS:
        return False
    return not replaced.exists() or not any(replaced.iterdir()) or _holds_package(replaced)


def _check_output(output: Path, bundle: Path, force: bool) -> None:
    """Refuse an output that holds something; with `force` a package is replaced, and nothing else."""
    if bundle.resolve().is_relative_to(output.resolve()) or output.resolve().is_relative_to(bundle.resolve()):
        raise OutputError(
            "the output and the bundle are not apart", where=output, remedy="Choose an --output beside the bundle"
        )
    if not os.path.lexists(output):
        return
    if is_link(output) or not output.is_dir():
        raise OutputError("the output exists and is no folder", where=output, remedy="Choose another --output")
    if not any(output.iterdir()):
        return
    if not force:
        raise OutputError(
            "the output folder exists", where=output, remedy="Choose another --output, or pass --force to replace it"
        )
    if not _holds_package(output):
        raise OutputError(
            "the output folder holds something that is no package; --force does not delete it",
            where=output,
            remedy="Choose another --output, or empty the folder yourself",
        )


def _holds_package(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (BILL, REQUIREMENTS, f"{MODEL}/{MANIFEST}"))
