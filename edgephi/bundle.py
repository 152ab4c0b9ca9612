"""The bundle: a folder stock onnxruntime-genai loads as it is, plus `edgephi.json`, which says what is in it and why.

Everything in a bundle comes from a stranger when the folder does. `read_manifest` and `check_bundle` are the border:
unknown or repeated keys, paths and links that leave the folder, files that disagree with the manifest, graphs that name
other files and settings that no bundle needs are errors before a library opens anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from edgephi.contents import check_contents
from edgephi.errors import BundleError
from edgephi.files import parse_json, read_file, replace_file, require_inside, unreadable
from edgephi.genai_config import GENAI_CONFIG as GENAI_CONFIG
from edgephi.manifest import MANIFEST as MANIFEST
from edgephi.manifest import BudgetFacts as BudgetFacts
from edgephi.manifest import CalibrationText as CalibrationText
from edgephi.manifest import FileEntry as FileEntry
from edgephi.manifest import GoldenAnswer as GoldenAnswer
from edgephi.manifest import GraphDevice as GraphDevice
from edgephi.manifest import GraphEntry as GraphEntry
from edgephi.manifest import KvCacheChoice as KvCacheChoice
from edgephi.manifest import LoraFacts as LoraFacts
from edgephi.manifest import LoraPart as LoraPart
from edgephi.manifest import LoraProduct as LoraProduct
from edgephi.manifest import LoraTarget as LoraTarget
from edgephi.manifest import Manifest as Manifest
from edgephi.manifest import MeasuredText as MeasuredText
from edgephi.manifest import ModelFacts as ModelFacts
from edgephi.manifest import Quality as Quality
from edgephi.manifest import QuantizationChoice as QuantizationChoice
from edgephi.manifest import RecipeRecord as RecipeRecord
from edgephi.manifest import Source as Source
from edgephi.manifest import TokenizerFacts as TokenizerFacts
from edgephi.manifest import WeightRecipe as WeightRecipe
from edgephi.npu_facts import NpuFacts as NpuFacts
from edgephi.npu_facts import NpuNumerics as NpuNumerics
from edgephi.npu_facts import NpuProof as NpuProof
from edgephi.npu_facts import NpuStage as NpuStage
from edgephi.records import first_problem

TOKENIZER = "tokenizer.json"
ROPE_SWITCH = "rope_switch"
"""Graph input of a model with two ropes, int64 [1] and optional: the longest sequence that takes the short one."""
LOGIT_ROWS = "logit_rows"
"""Graph input, int64 [rows] and optional: which tokens of a run get logits; the last one where nothing is said."""
LONG_ROPE_ADAPTER = "long_rope.onnx_adapter"
"""An onnxruntime adapter that sets this input to 0; through it onnxruntime-genai computes long prompts in pieces."""

# A load hashes what is small and decides behaviour (graph, configuration, tokenizer). Gigabytes of weights are hashed
# by `edgephi verify`, because reading them all would cost more than the load.
HASH_AT_LOAD_UP_TO = 32 * 2**20
MANIFEST_LIMIT = 4 * 2**20


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in 4 MB pieces; `on_bytes` is told how many more were read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(4 * 2**20))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            if on_bytes:
                on_bytes(count)
    return digest.hexdigest()


def contents_sha256(manifest: Manifest) -> str:
    """Of paths and SHA-256 of a bundle's files, as the manifest lists them; edgephi.json itself is not among them."""
    lines = sorted(f"{entry.path}\0{entry.sha256}\n" for entry in manifest.files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe_file(folder: Path, path: str, on_bytes: Callable[[int], None] | None = None) -> FileEntry:
    """The manifest's entry for a file that is in place; `on_bytes` is that of `sha256_of`."""
    full = folder / path
    return FileEntry(path=path, bytes=full.stat().st_size, sha256=sha256_of(full, on_bytes))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write edgephi.json (UTF-8, \\n), last of all files; one that is there is replaced whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / MANIFEST, text.encode(), "Free disk space, or make the folder writable")


def read_manifest(folder: Path) -> Manifest:
    """Read and validate edgephi.json.

    Raises:
        BundleError: not a folder, no manifest, a link out of the folder, or one this version does not understand.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        if folder.is_file():
            raise _is_file(folder)
        raise BundleError(
            "there is no such bundle", where=folder, remedy="Make one with `edgephi export SOURCE --output DIR`"
        )
    if os.path.lexists(path):
        require_inside(path, folder, BundleError, "Replace the link by its file, or export the model again")
    if not path.is_file():
        if is_checkpoint(folder):
            raise BundleError(CHECKPOINT, where=folder, remedy=EXPORT_FIRST)
        raise BundleError(
            f"this folder has no {MANIFEST}", where=folder, remedy="Name a folder that `edgephi export` wrote"
        )
    remedy = "Export the model again, or update edgephi if a newer version wrote it"
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            raise BundleError("the manifest is implausibly large", where=path, remedy="Export the model again")
    except OSError as error:
        raise unreadable(error, path, BundleError, remedy) from error
    try:
        data = read_file(path, limit=MANIFEST_LIMIT, error=BundleError, remedy=remedy)
        parse_json(data, where=path, error=BundleError, remedy=remedy)
        return Manifest.model_validate_json(data, strict=True)
    except BundleError as error:
        raise BundleError(f"the manifest cannot be used: {error.what}", where=path, remedy=error.remedy) from error
    except ValidationError as error:
        raise BundleError(f"the manifest cannot be used: {first_problem(error)}", where=path, remedy=remedy) from error


CHECKPOINT = "this is a checkpoint, and no bundle yet"
EXPORT_FIRST = "Export it first: `edgephi export SOURCE --output DIR`, then name that DIR"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds weights that `edgephi export` may read, and no graph."""
    return (folder / "config.json").is_file() and not (folder / GENAI_CONFIG).is_file()


def _is_file(path: Path) -> BundleError:
    if is_gguf(path):
        return BundleError("this is a GGUF file, and no bundle yet", where=path, remedy=EXPORT_FIRST)
    what = "this is a file, and a bundle is a folder"
    if (path.parent / MANIFEST).is_file():
        return BundleError(what, where=path, remedy=f"Name its folder, {path.parent}")
    return BundleError(what, where=path, remedy="Name a folder that `edgephi export` wrote")


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, or is at least called one."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"
    except OSError:
        return path.suffix.lower() == ".gguf"


def check_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    every_byte: bool,
    on_bytes: Callable[[int], None] | None = None,
    examined: bool = False,
) -> None:
    """Compare a folder with its manifest, and refuse what could harm whoever loads it.

    The manifest lists what every bundle has. Every file is present, regular, inside the folder and of its size; hashes
    are compared of all files, or of small ones. JSON has no key twice; the configuration has keys a bundle needs and no
    others; graphs name no file but the bundle's own. Nothing lies in the folder that a library would open and the
    manifest does not list.

    Args:
        examined: a folder with this manifest passed before under the same rules (`runtime/placement/examined.py`).
            Files whose hashes are compared here are then not read for what is in them again.

    Raises:
        BundleError: naming the first file that differs.
    """
    _require_complete(folder, manifest)
    for entry in manifest.files:
        _check_file(folder, entry, every_byte, on_bytes)
    plain = {file for graph in manifest.graphs for file in graph.files}
    compiled: dict[str, str] = {}
    if (npu := manifest.npu) is not None:
        plain |= {npu.embedding, npu.head, npu.token_graph or npu.head}
        compiled = {stage.graph: stage.binary for stage in npu.stages}
    hashed = frozenset(entry.path for entry in manifest.files if every_byte or entry.bytes <= HASH_AT_LOAD_UP_TO)
    listed = frozenset(entry.path for entry in manifest.files)
    check_contents(folder, listed, plain, compiled, known=hashed if examined else frozenset())


def _require_complete(folder: Path, manifest: Manifest) -> None:
    """Refuse a manifest that lists less than every bundle has: what it does not list, nobody compares."""
    needed = {GENAI_CONFIG, TOKENIZER}
    if manifest.model.rope_switch is not None and manifest.npu is None:
        needed.add(LONG_ROPE_ADAPTER)
    missing = sorted(needed - {entry.path for entry in manifest.files})
    if not manifest.graphs and manifest.npu is None:
        missing = ["graph for any device"]
    if missing:
        raise BundleError(
            f"the manifest lists no {missing[0]}, without which no bundle works",
            where=folder / MANIFEST,
            remedy="Copy the folder again, or export the model again",
        )


def _check_file(folder: Path, entry: FileEntry, every_byte: bool, on_bytes: Callable[[int], None] | None) -> None:
    path = folder / entry.path
    copy_again = "Copy it again, or export the model again"
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(
                "a file of the bundle is a link to the outside", where=path, remedy="Export the model again"
            )
        if not path.is_file():
            raise BundleError("a file of the bundle is missing", where=path, remedy="Export the model again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"a file of the bundle has {size:,} bytes where its manifest says {entry.bytes:,}",
                where=path,
                remedy=copy_again,
            )
        if (every_byte or size <= HASH_AT_LOAD_UP_TO) and sha256_of(path, on_bytes) != entry.sha256:
            raise changed(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, in older Pythons
        raise unreadable(error, path, BundleError, copy_again) from error


def read_unchanged(path: Path, sha256: str | None) -> bytes:
    """A file's bytes, for a library that is to get just what was checked: it may have been replaced since.

    Args:
        sha256: the manifest's; None: not compared.

    Raises:
        BundleError: the file is gone, or these are other bytes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(error, path, BundleError, "Copy it again, or export the model again") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise changed(path)
    return data


def changed(path: Path) -> BundleError:
    """The error for a file whose bytes are not those that the manifest lists."""
    return BundleError(
        "a file of the bundle was changed: its SHA-256 is not the manifest's",
        where=path,
        remedy="Copy it again, or export the model again",
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed. What another process removes meanwhile has none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found = os.lstat(Path(place) / name)
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total
