"""A bundle appears whole or not at all: it is written beside its place and renamed at the end.

What lies beside an output has a name that can be foretold, so it may be anybody's: links are refused, and a folder is
cleared only when it holds our own journal or a bundle.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgephi.bundle import GENAI_CONFIG, MANIFEST
from edgephi.contents import READ_BY_NAME
from edgephi.errors import EdgephiError, OutputError, SourceError
from edgephi.export.journal import JOURNAL, Journal, write_refusal
from edgephi.files import is_link, refuse_path, unreadable
from edgephi.lock import locked

_NAMES = READ_BY_NAME | {MANIFEST}
_ENDINGS = (".onnx", ".onnx.data", ".onnx_adapter")
GRAPH_ALLOWANCE = 32 * 2**20
"""Disk for graph, tokenizer and configuration, on top of the weights."""
RESERVE = 64 * 2**20
"""Disk left free for everything else on the machine."""
_NO_NAME = re.compile(r'[<>:"|?*\x00-\x1f]|[ .]$')
_DEVICES = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³])(?: *\..*)?", re.IGNORECASE)


def check_output(output: Path, force: bool) -> None:
    """Refuse an output folder that holds something, before any work is done.

    With `force` a bundle is replaced, and nothing else: a mistyped path must not cost a person their files.

    Raises:
        OutputError: the folder exists, is something else than a bundle, or has a name that no folder can have.
    """
    _check_name(output, windows=sys.platform == "win32")
    try:
        if not output.exists() and not is_link(output):
            return
        if not output.is_dir() or is_link(output):
            raise OutputError("the output exists and is no folder", where=output, remedy="Choose another --output")
        if not any(output.iterdir()):
            return
        holds_bundle = _holds_bundle(output)
    except OSError as error:
        raise write_refusal(error, output) from error
    if not force:
        raise OutputError(
            "the output folder exists", where=output, remedy="Choose another --output, or pass --force to replace it"
        )
    if not holds_bundle:
        raise OutputError(
            "the output folder holds something that is no bundle; --force does not delete it",
            where=output,
            remedy="Choose another --output, or empty the folder yourself",
        )


def _check_name(output: Path, *, windows: bool) -> None:
    refuse_path(OutputError, output)
    name = output.name
    if name in ("", ".."):  # the current folder, a parent, a root, a drive
        raise OutputError(
            "the output is no new folder", where=output, remedy="Give it a name of its own, such as --output phi4-mini"
        )
    if windows and (_NO_NAME.search(name) or _DEVICES.fullmatch(name)):
        raise OutputError("Windows has no folder of this name", where=output, remedy="Choose another --output")


def check_apart(source: str | Path, output: Path) -> None:
    """Refuse an output that is the source or holds it: replacing the one would remove the other.

    An output inside the source's folder is nobody's harm: a checkpoint's files are read by name.

    Raises:
        OutputError: they are not apart.
    """
    try:
        here = Path(source)
        if not here.exists():  # a hub id, or a name that opening the source refuses
            return
        origin, target = here.resolve(), output.resolve()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a circle of links; whoever opens the path says so
        return
    if origin.is_relative_to(target):
        raise OutputError(
            "the output and the source are not apart", where=output, remedy="Choose an --output beside the source"
        )


def check_disk(output: Path, needed: int) -> None:
    """Refuse to start when the disk cannot hold the bundle.

    Raises:
        OutputError: with both numbers, in MB.
    """
    try:
        free = shutil.disk_usage(_existing_parent(output)).free
    except OSError as error:
        raise write_refusal(error, output) from error
    if free < needed + RESERVE:
        raise OutputError(
            f"the bundle takes {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free",
            where=output.parent,
            remedy=f"Free {(needed + RESERVE - free) / 1e6:,.0f} MB or choose an --output on another disk",
        )


@contextmanager
def staged(
    output: Path, force: bool, key: str, keeps: Callable[[str], bool] = lambda name: False
) -> Iterator[tuple[Path, Journal]]:
    """A folder beside `output` to write into: it takes `output`'s place when the block ends well.

    After an error the folder is removed. After an interruption (Ctrl-C, a kill) it stays, and the next
    call for the same output with the same key gets it again, with the journal of what is done; another key starts anew.

    Args:
        keeps: whether an interrupted export's file or folder of that name, at the top, is needed to go on, beside those
            that the journal vouches for. Everything else is removed first.

    Raises:
        OutputError: the folder cannot be made or renamed, is not ours, or another export is writing to it.
    """
    try:
        output = output.absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.parent / f".{output.name}.partial"
        with locked(output.parent / f".{output.name}.lock"):
            check_output(output, force)  # another export may have ended since
            _require_ours(partial)
            _replaced(output)
            yield from _write(partial, output, force, key, keeps)
    except OSError as error:
        raise _refusal(error, output) from error


def _write(
    partial: Path, output: Path, force: bool, key: str, keeps: Callable[[str], bool]
) -> Iterator[tuple[Path, Journal]]:
    """The lock is held and the folder ours."""
    try:
        partial.mkdir(exist_ok=True)
        _clear(partial, keeps if _only_plain(partial) else None, key)
        journal = Journal(partial / JOURNAL, key)
        yield partial, journal
        check_output(output, force)
        (partial / JOURNAL).unlink(missing_ok=True)
        _replace(partial, output)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _require_ours(partial: Path) -> None:
    """Refuse to write into, or clear, what no export left there."""
    if not os.path.lexists(partial):
        return
    ours = not is_link(partial) and partial.is_dir()
    if ours:
        # whoever owns a folder can put links into it at any moment
        if hasattr(os, "geteuid") and partial.lstat().st_uid != os.geteuid():
            raise OutputError(
                "the folder in which an export keeps its unfinished bundle belongs to another user",
                where=partial,
                remedy="Choose another --output, or have its owner remove it",
            )
        left = {entry.name for entry in partial.iterdir()} - {JOURNAL}
        ours = Journal.stands_at(partial / JOURNAL, empty=not left) or _holds_bundle(partial)
        ours = ours or (not left and not os.path.lexists(partial / JOURNAL))
    if not ours:
        raise OutputError(
            "this stands where an export keeps its unfinished bundle, and is none",
            where=partial,
            remedy="Move it away, or choose another --output",
        )


def _only_plain(folder: Path) -> bool:
    """Whether there are only folders and files of one name: what is written into such a folder lands nowhere else."""
    for entry in folder.iterdir():
        found = entry.lstat()
        if is_link(entry):
            return False
        if stat.S_ISDIR(found.st_mode):
            if not _only_plain(entry):
                return False
        elif not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            return False
    return True


def _clear(partial: Path, keeps: Callable[[str], bool] | None, key: str) -> None:
    """Remove what an interrupted export left and this one does not need; of another one (or None) all of it."""
    vouched = Journal.names_left(partial / JOURNAL, key) if keeps else None
    for stale in partial.iterdir():
        if vouched is not None and keeps and (stale.name == JOURNAL or keeps(stale.name) or stale.name in vouched):
            continue
        if stale.is_dir() and not is_link(stale):
            shutil.rmtree(stale)
        else:
            stale.unlink()


def bundle_files(folder: Path) -> list[Path]:
    """The files in a staged folder that belong to the bundle, by name."""
    return sorted(path for path in folder.iterdir() if path.name != JOURNAL)


def _holds_bundle(folder: Path) -> bool:
    """Whether an export made this; or another program, when there is nothing that is no part of a bundle."""
    if (folder / MANIFEST).is_file():
        with (folder / MANIFEST).open("rb") as stream:
            if stream.read(1) == b"{":
                return True
    # a bundle with a damaged manifest is replaced as well
    return ((folder / GENAI_CONFIG).is_file() or (folder / MANIFEST).is_file()) and all(
        entry.is_file() and (entry.name in _NAMES or entry.name.endswith(_ENDINGS)) for entry in folder.iterdir()
    )


def _replaced(output: Path) -> Path:
    """Where a bundle that is replaced lies for a moment; what an export that was killed then left there may go.

    Raises:
        OutputError: something else is there.
    """
    old = output.parent / f".{output.name}.replaced"
    if os.path.lexists(old) and (is_link(old) or not old.is_dir() or (any(old.iterdir()) and not _holds_bundle(old))):
        raise OutputError(
            "this stands where an export keeps the bundle it replaces, and is none",
            where=old,
            remedy="Move it away, or choose another --output",
        )
    return old


def _replace(partial: Path, output: Path) -> None:
    old = _replaced(output)
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refusal(error: OSError, output: Path) -> EdgephiError:
    """Of the output; or of a file elsewhere, which is one that is read."""
    named = error.filename
    if isinstance(named, str) and Path(named).is_absolute() and not Path(named).is_relative_to(output.parent):
        return unreadable(error, Path(named), SourceError, "Check the checkpoint's files")
    return write_refusal(error, output)


def _existing_parent(path: Path) -> Path:
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path
