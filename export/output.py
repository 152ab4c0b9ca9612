"""A bundle appears whole or not at all: it is written beside its place and renamed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgephi.bundle import GENAI_CONFIG, MANIFEST
from edgephi.errors import OutputError
from edgephi.export.data_file import JOURNAL, Journal, write_refusal

LOCK = "export.lock"
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
def staged(output: Path, force: bool, key: str) -> Iterator[tuple[Path, Journal]]:
    """A folder beside `output` to write into: it takes `output`'s place when the block ends well.

    After an error the folder is removed. After an interruption (Ctrl-C, a kill) it stays, and the next
    call for the same output with the same key gets it again, with the journal of what is done; another key starts anew.

    Raises:
        OutputError: the folder cannot be made or renamed, or another export is writing to it.
    """
    output = output.absolute()
    partial = output.parent / f".{output.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial)
    except OSError as error:
        raise write_refusal(error, output.parent) from error
    try:
        journal = Journal(partial / JOURNAL, key)
        if not journal.continues:
            for stale in bundle_files(partial):
                if stale.is_dir() and not stale.is_symlink():
                    shutil.rmtree(stale)
                else:
                    stale.unlink()
        yield partial, journal
        check_output(output, force)
        for working_file in (lock, partial / JOURNAL):
            working_file.unlink(missing_ok=True)
        _replace(partial, output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise write_refusal(error, output) from error
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.unlink(missing_ok=True)


def bundle_files(folder: Path) -> list[Path]:
    """The files in a staged folder that belong to the bundle, by name."""
    return sorted(path for path in folder.iterdir() if path.name not in (LOCK, JOURNAL))


def _claim(partial: Path) -> Path:
    """Write our process into the lock file, unless a process that is alive is there."""
    import psutil

    lock = partial / LOCK
    ours = psutil.Process()
    try:
        pid, started = lock.read_text(encoding="ascii").split()
        if int(pid) != ours.pid and psutil.Process(int(pid)).create_time() == float(started):
            raise OutputError(
                f"another export, process {pid}, is writing this output",
                where=partial,
                remedy="Wait until it ends, or choose another --output",
            )
    except (FileNotFoundError, ValueError, psutil.Error):
        pass  # nobody, or one that was killed
    lock.write_text(f"{ours.pid} {ours.create_time()!r}", encoding="ascii")
    return lock


def _replace(partial: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.replaced"
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
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
