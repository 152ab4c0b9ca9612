"""A bundle appears whole or not at all: it is written beside its place and renamed at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgephi.bundle import GENAI_CONFIG, MANIFEST
from edgephi.errors import OutputError

RESERVE = 64 * 2**20
"""Disk left free for everything else on the machine."""


def check_output(output: Path, force: bool) -> None:
    """Refuse an output folder that holds something, before any work is done.

    With `force` a bundle is replaced, and nothing else: a mistyped path must not cost a person their files.

    Raises:
        OutputError: the folder exists, or is something else than a bundle.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise OutputError("the output exists and is no folder", where=output, remedy="Choose another --output")
    if not any(output.iterdir()):
        return
    if not force:
        raise OutputError(
            "the output folder exists", where=output, remedy="Choose another --output, or pass --force to replace it"
        )
    if not (output / MANIFEST).is_file() and not (output / GENAI_CONFIG).is_file():
        raise OutputError(
            "the output folder holds something that is no bundle; --force does not delete it",
            where=output,
            remedy="Choose another --output, or empty the folder yourself",
        )


def check_disk(output: Path, needed: int) -> None:
    """Refuse to start when the disk cannot hold the bundle.

    Raises:
        OutputError: with both numbers, in MB.
    """
    free = shutil.disk_usage(_existing_parent(output)).free
    if free < needed + RESERVE:
        raise OutputError(
            f"the bundle takes {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free",
            where=output.parent,
            remedy=f"Free {(needed + RESERVE - free) / 1e6:,.0f} MB or choose an --output on another disk",
        )


@contextmanager
def staged(output: Path, force: bool) -> Iterator[Path]:
    """A folder beside `output` to write into: it takes `output`'s place when the block ends well, else it is removed.

    Raises:
        OutputError: the folder cannot be made or renamed.
    """
    output = output.absolute()
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _refusal(error, output.parent) from error
    try:
        yield partial
        check_output(output, force)
        _replace(partial, output)
    except OSError as error:
        raise _refusal(error, output) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.replaced-{os.getpid()}"
    if output.exists():
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _existing_parent(path: Path) -> Path:
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path


def _refusal(error: OSError, where: Path) -> OutputError:
    return OutputError(
        f"the output could not be written: {error.strerror or error}",
        where=where,
        remedy="Check the folder's permissions and free space, then run the same command again",
    )
