"""What edgephi keeps on this machine, where it lies, and what of it may go: all that can be made again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgephi.bundle import folder_bytes, read_manifest
from edgephi.devices.cache import cache_folder
from edgephi.errors import BundleError, EdgephiError
from edgephi.files import is_link
from edgephi.store.library import REMOVED, InstalledModel, delete_folder, installed
from edgephi.store.names import DEMO, as_name
from edgephi.store.places import models_folder

Kind = Literal[
    "model",
    "compiled for an NPU",
    "unfinished export",
    "unfinished download",
    "download",
    "prepacked weights",
    "integer weights",
    "saved prefixes",
    "demo of a file",
]


@dataclass(frozen=True)
class Kept:
    """A folder or file that edgephi keeps."""

    kind: Kind
    name: str
    """Of the model, or of what it is."""
    path: Path
    bytes: int
    cleaned: Literal["never", "clean", "downloads"]
    """What removes it: nothing (a model: `edgephi rm`), `clean`, or `clean` with downloads."""


def kept() -> list[Kept]:
    """All that edgephi keeps and that takes space, by kind.

    Raises:
        OutputError: a folder cannot be read.
    """
    models = installed()
    return [one for one in (*_models(models), *_unfinished(), *_downloads(models), *_cached()) if one.bytes]


def clean(*, downloads: bool = False) -> list[Kept]:
    """Remove what can be made again: unfinished exports and downloads, prepacked and integer weights, saved prefixes,
    bundles of `edgephi demo --weights`.

    Args:
        downloads: also checkpoints in the hub's cache that installed models were made of, and the demo's weights.

    Returns:
        What was removed. What is in use, or another process is at work on, stays.

    Raises:
        OutputError: a folder cannot be read.
    """
    return [one for one in kept() if one.cleaned in ("clean", *(("downloads",) if downloads else ())) and _remove(one)]


def _models(models: list[InstalledModel]) -> Iterator[Kept]:
    for model in models:
        yield Kept("model", model.name, model.folder, model.bytes, "never")
        with suppress(BundleError, OSError):
            manifest = read_manifest(model.folder)
            if manifest.npu is not None:
                binaries = {stage.binary for stage in manifest.npu.stages}
                size = sum((model.folder / binary).stat().st_size for binary in binaries)
                yield Kept("compiled for an NPU", model.name, model.folder, size, "never")


def _unfinished() -> Iterator[Kept]:
    root = models_folder()
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if not path.name.startswith(".") or is_link(path) or not path.is_dir():
            continue
        name = path.name[1:].split(REMOVED)[0].removesuffix(".partial").removesuffix(".replaced")
        if as_name(name) == name and path.name != f".{name}":
            yield Kept("unfinished export", name, path, folder_bytes(path), "clean")


def _downloads(models: list[InstalledModel]) -> Iterator[Kept]:
    from edgephi.export.checkpoint.hub import HUB_ID, repository_folder
    from edgephi.store.hub_child import UNFINISHED
    from edgephi.store.names import known_models

    # what a manifest alone says of its source is a stranger's word
    pulled = {model.source for model in models if model.pulled is not None and HUB_ID.fullmatch(model.source)}
    for name in sorted(pulled | {known.hub for known in known_models().values() if known.hub}):
        folder = repository_folder(name)
        if not folder.is_dir() or is_link(folder):
            continue
        left = sorted(folder.glob(f"blobs/*{UNFINISHED}"))
        for path in left:
            yield Kept("unfinished download", name, path, path.stat().st_size, "clean")
        size = folder_bytes(folder) - sum(path.stat().st_size for path in left)
        # what was not pulled through the store may be another program's
        yield Kept("download", name, folder, size, "downloads" if name in pulled else "never")
    from edgephi.demo import GGUF

    weights = cache_folder() / GGUF
    if weights.is_file() and not is_link(weights):
        yield Kept("download", DEMO, weights, weights.stat().st_size, "downloads")


def _cached() -> Iterator[Kept]:
    root = cache_folder()
    kinds: tuple[tuple[str, Kind], ...] = (
        ("prepacked", "prepacked weights"),
        ("integers", "integer weights"),
        ("prefixes", "saved prefixes"),
    )
    for folder, kind in kinds:
        for path in (root / folder, *_left_of(root, folder)):
            if path.is_dir() and not is_link(path):
                yield Kept(kind, folder, path, folder_bytes(path), "clean")
    for path in (*sorted(root.glob("demo-*")), *_left_of(root, "demo-*")) if root.is_dir() else ():
        if path.is_dir() and not is_link(path):
            yield Kept("demo of a file", path.name, path, folder_bytes(path), "clean")


def _left_of(root: Path, name: str) -> list[Path]:
    """Folders of this name that were being deleted when that was interrupted."""
    return sorted(root.glob(f".{name}{REMOVED}*"))


def _remove(one: Kept) -> bool:
    """Whether it is gone."""
    try:
        with ExitStack() as held:
            for lock in _locks(one):
                held.enter_context(lock)
            if one.path.is_file():
                one.path.unlink()
            else:
                delete_folder(one.path)
    except (OSError, EdgephiError):
        return False
    return True


def _locks(one: Kept) -> Iterator[AbstractContextManager[None]]:
    """Those that whoever is at work on it holds."""
    from edgephi.lock import locked
    from edgephi.store.hub_child import UNFINISHED, lock_of_blob
    from edgephi.store.progress_file import held_by, running

    if one.kind == "unfinished export":
        yield held_by(one.name, running(one.name))
        yield locked(one.path.with_name(f".{one.name}.lock"))  # of `edgephi export`, which may write here too
    elif one.kind == "unfinished download":
        yield lock_of_blob(one.path.parent, one.path.name.removesuffix(UNFINISHED))
    elif one.kind == "download":
        users = {model.name for model in installed() if model.pulled is not None and model.source == one.name}
        for name in sorted(users | ({DEMO} if one.name == DEMO else set())):
            yield held_by(name, running(name))
