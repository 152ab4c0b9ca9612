"""What is installed: finding, listing and removing models of the store.

A model is a bundle in `models/NAME`, and any bundle there counts. What a bundle does not say of itself lies in two
small files of the state folder: NAME.json, where it was pulled from, and NAME.used, whose time is its last use's.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from edgephi.arguments import require_path, require_text
from edgephi.bundle import MANIFEST, Manifest, Quality, folder_bytes, read_manifest
from edgephi.errors import BundleError, OutputError, UsageError
from edgephi.files import is_link, read_file, replace_file
from edgephi.records import Strict
from edgephi.store.names import as_name, is_path, not_installed, nothing_to_remove, require_name
from edgephi.store.places import models_folder, state_folder, unusable

RECORD_LIMIT = 2**16
REMOVED = ".removed-"
"""Begins, behind a dot and the name, what is called so while it is deleted."""


class PullRecord(Strict):
    """NAME.json of the state folder."""

    source: str
    """As `pull` was told: a hub id, a path, `ollama:NAME`, or `demo`."""
    revision: str | None = None
    """Commit of the hub's repository."""
    asked: str | None = None
    """Branch, tag or commit that was asked for."""
    quantize: str = "auto"
    """As `edgephi.export_model` was asked."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""


@dataclass(frozen=True)
class InstalledModel:
    """A model of the store."""

    name: str
    source: str
    """Where it was pulled from."""
    folder: Path
    bytes: int
    quality: Quality | None
    """Its quality contract (`edgephi evaluate --record`)."""
    devices: tuple[str, ...]
    """What it has graphs for: short names of providers, or the name of the chip it was compiled for."""
    last_used: datetime | None
    """In UTC; None: never by its name."""
    pulled: PullRecord | None = None
    """How it was pulled; None: it was not, or nobody knows any more."""
    problem: str | None = None
    """Why the bundle cannot be used; None: it can, as far as its manifest says."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out when it was pulled, and why."""
        return self.pulled.notes if self.pulled else ()

    @property
    def device(self) -> str:
        """`devices` in one text."""
        return ", ".join(self.devices)


def find(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder of a bundle: what is a path as it is, and of a name the folder of the installed model.

    A text is a name if it has no separator and there is no folder of that name here. Nothing is downloaded. A name that
    is found counts as used.

    Raises:
        ModelNotInstalledError: there is neither a folder nor an installed model of this name.
        UsageError: it is neither a text nor a path.
    """
    require_path("the model", name_or_folder, "a folder or the name of an installed model")
    path = Path(name_or_folder)
    if not isinstance(name_or_folder, str) or is_path(name_or_folder):
        return path
    with suppress(OSError, ValueError):  # ValueError: a NUL in the name; whoever opens it says so
        if path.is_dir():
            return path
    name = as_name(name_or_folder)
    if name is None:
        return path
    folder = _folder_of(name)
    if folder is not None:
        record_use(name)
        return folder
    if path.exists():
        return path
    raise not_installed(name, installed_names())


def find_installed(name: str) -> InstalledModel | None:
    """The installed model of a valid name; None: there is none.

    Raises:
        OutputError: the store cannot be read.
    """
    folder = _folder_of(name)
    return None if folder is None else _describe(name, folder)


def installed() -> list[InstalledModel]:
    """All models of the store, by name.

    Raises:
        OutputError: the store cannot be read.
    """
    return [_describe(name, folder) for name, folder in _folders()]


def installed_names() -> list[str]:
    """Their names alone, without a look into them.

    Raises:
        OutputError: the store cannot be read.
    """
    return [name for name, _ in _folders()]


def remove(name: str) -> int:
    """Delete an installed model with what an interrupted pull left of it; the bytes that are free now.

    Only folders of the store are deleted, and no link is followed.

    Raises:
        UsageError: it is no name of a model.
        ModelNotInstalledError: no such model.
        OutputError: it is in use, being pulled, or cannot be deleted.
    """
    require_text("the name", name, "the name of a model, as a text")
    if is_path(name):
        raise UsageError(
            "only models of the store are removed, by their name",
            where=name,
            remedy="Name one that `edgephi list` shows; delete other folders yourself",
        )
    name = require_name(name)
    folder = _folder_of(name)
    partial = models_folder() / f".{name}.partial"
    if folder is None and not _is_own_folder(partial):
        raise nothing_to_remove(name, installed_names())
    from edgephi.store.progress_file import held_by, running

    with held_by(name, running(name)):
        if folder is not None and (user := user_of(folder)) is not None:
            raise OutputError(
                f"{name} is in use by process {user}", where=folder, remedy="End that program, then remove it again"
            )
        freed = sum(delete_folder(one) for one in (folder, partial) if one is not None and _is_own_folder(one))
        for ending in ("json", "used", "progress"):  # the last of a pull that was killed
            with suppress(OSError):
                (state_folder() / f"{name}.{ending}").unlink()
        return freed


def record_use(name: str) -> None:
    """The model was used now. A store that cannot be written is no reason not to use it."""
    with suppress(OSError, OutputError):
        state = state_folder()
        state.mkdir(parents=True, exist_ok=True)
        (state / f"{name}.used").touch()


def write_record(name: str, record: PullRecord) -> None:
    """Note where a model came from.

    Raises:
        OutputError: it cannot be written.
    """
    text = record.model_dump_json(indent=2) + "\n"
    replace_file(state_folder() / f"{name}.json", text.encode(), "Free disk space, or make the folder writable")


def forget_record(name: str) -> None:
    """A model that was to come did not."""
    with suppress(OSError):
        (state_folder() / f"{name}.json").unlink()


def read_record(name: str) -> PullRecord | None:
    """Where a model came from; None: it was not pulled, or nobody knows any more."""
    path = state_folder() / f"{name}.json"
    try:
        if is_link(path):
            return None
        record = read_file(path, limit=RECORD_LIMIT, error=OutputError, remedy="Remove it")
        return PullRecord.model_validate_json(record)
    except (OutputError, ValidationError):
        return None


def devices_of(manifest: Manifest) -> tuple[str, ...]:
    """What a bundle has graphs for."""
    if manifest.npu is not None:
        return (manifest.npu.target,)
    return tuple(graph.device for graph in manifest.graphs)


def delete_folder(folder: Path) -> int:
    """Delete a folder of the store, which is renamed first: half of a bundle is never found under its name.

    Raises:
        OutputError: it cannot be renamed (on Windows, because a file of it is in use) or deleted.
    """
    size = folder_bytes(folder)
    aside = folder.with_name(f".{folder.name.lstrip('.')}{REMOVED}{secrets.token_hex(4)}")
    try:
        folder.rename(aside)
    except PermissionError as problem:
        raise OutputError(
            f"it is in use, or may not be deleted: {problem.strerror or problem}",
            where=folder,
            remedy="End the programs that use it, then remove it again",
        ) from problem
    except OSError as problem:
        raise unusable(problem, folder) from problem
    try:
        shutil.rmtree(aside)
    except OSError as problem:
        raise unusable(problem, aside) from problem
    return size


def user_of(folder: Path) -> int | None:
    """A process that has a file of the folder mapped, as a loaded model has; None: none, or the system does not tell.

    Linux tells of this user's processes. On Windows the folder cannot be renamed while one of its files is mapped.
    """
    if sys.platform != "linux":
        return None
    inside = f" {folder.resolve()}/"
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if inside in maps.read_text(encoding="utf-8", errors="replace"):
                return int(maps.parent.name)
    return None


def _folders() -> Iterator[tuple[str, Path]]:
    """Names and folders of the models there are."""
    root = models_folder()
    try:
        entries = sorted(root.iterdir()) if root.is_dir() else []
    except OSError as problem:
        raise unusable(problem, root) from problem
    for entry in entries:
        if as_name(entry.name) == entry.name and _holds_bundle(entry):
            yield entry.name, entry


def _folder_of(name: str) -> Path | None:
    folder = models_folder() / name
    return folder if _holds_bundle(folder) else None


def _is_own_folder(path: Path) -> bool:
    return not is_link(path) and path.is_dir()


def _holds_bundle(folder: Path) -> bool:
    """Whether it is a folder, and no link to one, with a manifest."""
    try:
        return _is_own_folder(folder) and (folder / MANIFEST).is_file()
    except OSError:
        return False


def _describe(name: str, folder: Path) -> InstalledModel:
    record = read_record(name)
    manifest, problem = None, None
    try:
        manifest = read_manifest(folder)
        problem = _missing(folder, manifest)
    except BundleError as error:
        problem = str(error)
    source = record.source if record else manifest.source.name if manifest else ""
    return InstalledModel(
        name,
        source,
        folder,
        folder_bytes(folder),
        manifest.quality if manifest else None,
        devices_of(manifest) if manifest else (),
        _last_used(name),
        record,
        problem,
    )


def _missing(folder: Path, manifest: Manifest) -> str | None:
    """The first file that is not there with its size; what is in them is for a load to check."""
    for entry in manifest.files:
        try:
            if (folder / entry.path).stat().st_size == entry.bytes:
                continue
        except OSError:
            pass
        return f"{entry.path} is missing or of another size"
    return None


def _last_used(name: str) -> datetime | None:
    try:
        return datetime.fromtimestamp((state_folder() / f"{name}.used").stat().st_mtime, UTC)
    except (OSError, OutputError, ValueError, OverflowError):  # a clock that was wrong
        return None
