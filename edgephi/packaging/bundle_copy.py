"""A bundle's copy with the graphs of some devices: every byte is hashed on its way, and a whole bundle is left."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgephi.bundle import GENAI_CONFIG, Manifest, changed, check_bundle, read_manifest, write_manifest
from edgephi.devices.providers import all_providers, provider, providers_of, require_known_graphs
from edgephi.errors import BundleError, DeviceError, NoGraphError, UsageError
from edgephi.files import unreadable
from edgephi.genai_config import parse_genai_config

PIECE = 4 * 2**20


def bundle_devices(manifest: Manifest) -> tuple[str, ...]:
    """Short names of the providers that a bundle has graphs for, in the registry's order."""
    there = {graph.device for graph in manifest.graphs}
    compiled = {known.short for known in all_providers() if known.compiled} if manifest.npu is not None else set()
    return tuple(known.short for known in all_providers() if known.short in there | compiled)


def chosen_devices(folder: Path, manifest: Manifest, asked: Sequence[str]) -> tuple[str, ...]:
    """The providers to package for.

    Args:
        asked: names of providers, or classes of devices (gpu, npu), which stand for those that the bundle has a graph
            for; empty: every device of the bundle.

    Raises:
        UsageError: a name is none of a device.
        NoGraphError: the bundle has no graph for a device.
    """
    there = bundle_devices(manifest)
    chosen = set() if asked else set(there)
    for name in asked:
        members = [known.short for known in providers_of(name)]
        if not members:
            try:
                members = [provider(name).short]
            except DeviceError as error:
                words = ", ".join(["gpu", "npu", *(known.short for known in all_providers() if known.runs_graphs)])
                raise UsageError(f"no device {name!r}", remedy=f"Name one of {words}") from error
        if not (fitting := set(members) & set(there)):
            raise NoGraphError(
                f"the bundle has no graph for {name}, only for {', '.join(there)}",
                where=folder,
                remedy="Choose another --device, or export the model for this one",
                device=name if providers_of(name) else provider(name).device_class,
            )
        chosen |= fitting
    return tuple(short for short in there if short in chosen)


def reduced_manifest(folder: Path, manifest: Manifest, devices: Sequence[str]) -> Manifest:
    """The manifest without the graphs of other devices and their files; the same object where nothing goes.

    The CPU's graphs always stay: they are small, have their weights in common with the others, and are what a stock
    onnxruntime-genai and a fallback run.
    """
    config = parse_genai_config(folder / GENAI_CONFIG).model.decoder
    kept = tuple(
        graph
        for graph in manifest.graphs
        if graph.device in ("cpu", *devices) or config.filename in graph.files or config.pipeline is not None
    )
    if len(kept) == len(manifest.graphs):
        return manifest
    wanted = {file for graph in kept for file in graph.files}
    gone = {file for graph in manifest.graphs for file in graph.files} - wanted
    files = tuple(entry for entry in manifest.files if entry.path not in gone)
    reduced = manifest.model_copy(update={"graphs": kept, "files": files})
    return Manifest.model_validate_json(reduced.model_dump_json(), strict=True)


def open_bundle(folder: Path) -> Manifest:
    """The manifest of a folder that holds what it says, as far as a load looks.

    Raises:
        BundleError: it does not.
    """
    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    check_bundle(folder, manifest, every_byte=False)
    return manifest


def copy_bundle(folder: Path, reduced: Manifest, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Copy a bundle's files, comparing every byte with the manifest, and write the manifest.

    Args:
        reduced: of `reduced_manifest`.
        on_bytes: told how many bytes more were copied.

    Raises:
        BundleError: a file is not what the manifest says, or cannot be read.
        OSError: it cannot be written.
    """
    target.mkdir()
    for entry in reduced.files:
        place = target / entry.path
        place.parent.mkdir(parents=True, exist_ok=True)
        if _copy(folder / entry.path, place, on_bytes) != entry.sha256:
            raise changed(folder / entry.path)
    write_manifest(target, reduced)
    check_bundle(target, reduced, every_byte=False)


def _copy(source: Path, target: Path, on_bytes: Callable[[int], None]) -> str:
    """SHA-256 of what was copied."""
    digest = hashlib.sha256()
    with target.open("xb") as out:
        for piece in _pieces(source):
            digest.update(piece)
            out.write(piece)
            on_bytes(len(piece))
    return digest.hexdigest()


def _pieces(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as stream:
            while piece := stream.read(PIECE):
                yield piece
    except OSError as error:
        raise unreadable(error, source, BundleError, "Copy it again, or export the model again") from error
