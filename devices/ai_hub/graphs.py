"""What of a bundle can go to a hosted device: its graphs, the files each one reads, and what it takes.

The answer is read from the graphs that the manifest lists, because the graph is what the hub will see.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from edgephi.bundle import FileEntry, Manifest, check_bundle, read_manifest
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import BundleError, HubError, UsageError
from edgephi.files import said

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COMPILED = "EPContext"
"""The operator of onnxruntime (domain com.microsoft) that stands for a compiled graph."""
DTYPES = frozenset({"float16", "float32", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16"})
"""Element types that qai-hub 0.56 can send."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a graph."""

    name: str
    shape: tuple[int | str | None, ...]
    """A dimension that is not a number is not fixed."""
    dtype: str
    """NumPy's name."""


@dataclass(frozen=True)
class HubGraph:
    """A graph of a bundle, and everything it needs to run elsewhere."""

    bundle: str
    """Name of the bundle's folder."""
    name: str
    """Path in the bundle, without .onnx."""
    folder: Path
    files: tuple[FileEntry, ...]
    """The .onnx first, then what it reads."""
    inputs: tuple[InputSpec, ...]
    compiled: bool
    """For an NPU, into a context binary."""

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """Of names and hashes of its files: another content is another graph."""
        listing = "\n".join(f"{PurePosixPath(file.path).name} {file.sha256}" for file in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()


def hub_graphs(folder: Path, patterns: Sequence[str] = ()) -> tuple[HubGraph, ...]:
    """The graphs of a bundle: those compiled for an NPU, or those whose names match one of the patterns.

    Args:
        folder: a bundle; the sizes of its files and the hashes of the small ones are checked first.
        patterns: shell patterns of graph names (`npu/prefill_*`).

    Raises:
        BundleError: the bundle is incomplete, or a graph reads a file that is not in it.
        UsageError: nothing matches.
    """
    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    check_bundle(folder, manifest, every_byte=False)
    name = folder.resolve().name
    graphs = [_read_graph(folder, name, manifest, file) for file in manifest.files if file.path.endswith(".onnx")]
    if not patterns:
        chosen = [graph for graph in graphs if graph.compiled]
        if not chosen:
            raise UsageError(
                "the bundle has no graph for an NPU",
                where=folder,
                remedy="Export it for a device with an NPU, or name the graphs to send",
            )
        return tuple(chosen)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(graph.name, pattern) for graph in graphs):
            raise UsageError(
                f"no graph of the bundle is called {pattern!r}",
                where=folder,
                remedy=f"Choose from {', '.join(graph.name for graph in graphs)}",
            )
    return tuple(graph for graph in graphs if any(fnmatch.fnmatchcase(graph.name, pattern) for pattern in patterns))


def _read_graph(folder: Path, bundle: str, manifest: Manifest, file: FileEntry) -> HubGraph:
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    path = folder / file.path
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, OSError) as error:
        raise BundleError("the graph cannot be read", where=path, remedy="Export the model again") from error
    reads = [str(ExternalDataInfo(tensor).location) for tensor in graph.initializer if uses_external_data(tensor)]
    contexts = [node for node in graph.node if node.op_type == COMPILED]
    for node in contexts:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        # embed_mode 0: the context is in a file of this name; 1, the default: in the attribute itself
        if "embed_mode" in attributes and attributes["embed_mode"].i == 0 and "ep_cache_context" in attributes:
            reads.append(attributes["ep_cache_context"].s.decode("utf-8", "replace"))
    listed = {entry.path: entry for entry in manifest.files}
    beside = PurePosixPath(file.path).parent
    files = [file]
    for read in dict.fromkeys(reads):
        entry = listed.get(str(beside / read))
        if entry is None or "/" in read:
            raise BundleError(
                f"the graph reads {read[:100]!r}, which the manifest does not list beside it",
                where=path,
                remedy="Export the model again",
            )
        files.append(entry)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_input_spec(value, path) for value in graph.input if value.name not in weights)
    return HubGraph(bundle, file.path.removesuffix(".onnx"), folder, tuple(files), inputs, bool(contexts))


def _input_spec(value: object, path: Path) -> InputSpec:
    import onnx

    assert isinstance(value, onnx.ValueInfoProto)
    kind = value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    except (KeyError, TypeError) as error:
        raise BundleError(f"input {value.name!r} is no tensor", where=path, remedy="Export the model again") from error
    dimensions = (d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim)
    return InputSpec(value.name, tuple(dimensions), dtype)


def require_sendable(graph: HubGraph) -> None:
    """The hub takes one .onnx with one .data or .bin, and a device takes only fixed shapes.

    Raises:
        BundleError: the graph is otherwise.
    """
    path = graph.folder / graph.files[0].path
    for spec in graph.inputs:
        if not all(isinstance(size, int) and size > 0 for size in spec.shape):
            raise BundleError(
                f"input {spec.name!r} has no fixed shape: {list(spec.shape)}",
                where=path,
                remedy="Name graphs that are built for an NPU",
            )
        if spec.dtype not in DTYPES:
            raise BundleError(
                f"input {spec.name!r} is {spec.dtype}, which the hub does not take",
                where=path,
                remedy="Name graphs that are built for an NPU",
            )
    beside = [PurePosixPath(file.path).suffix for file in graph.files[1:]]
    if len(beside) > 1 or (beside and beside[0] not in (".data", ".bin")):
        raise BundleError(
            f"the graph reads {', '.join(file.path for file in graph.files[1:])}; the hub takes one .data or one .bin",
            where=path,
            remedy="Name graphs that are built for an NPU",
        )


def pack(graph: HubGraph, work: Path) -> Path:
    """The one file that is uploaded: the .onnx, or a .zip of a folder that holds it and what it reads.

    qai-hub would zip a folder itself, leave the archive behind and spend minutes compressing what does not compress.

    Args:
        work: an empty folder that outlives the upload.

    Raises:
        HubError: the disk is too small.
    """
    first = graph.folder / graph.files[0].path
    if len(graph.files) == 1:
        return first
    # qai-hub unpacks the archive once more, to look at what is in it
    free = shutil.disk_usage(work).free
    if free < 2 * graph.bytes:
        raise HubError(
            f"packing {graph.name} takes {2 * graph.bytes:,} bytes for a while, {free:,} are free",
            where=work,
            remedy="Free disk space, or set TMPDIR to a larger disk",
        )
    inside = f"{first.stem}.onnx"
    archive = work / f"{inside}.zip"
    with zipfile.ZipFile(archive, "w", compression=zipfile.ZIP_STORED) as packed:
        for file in graph.files:
            packed.write(graph.folder / file.path, f"{inside}/{PurePosixPath(file.path).name}")
    return archive


def read_inputs(path: Path, graph: HubGraph) -> Mapping[str, NDArray[np.generic]]:
    """Arrays of an .npz by the graph's input names, in the graph's order.

    Raises:
        UsageError: the file cannot be read, or a name, shape or type is not the graph's.
    """
    import numpy as np

    remedy = "Save one array for each input with numpy.savez"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"the inputs cannot be read: {said(error)}", where=path, remedy=remedy) from error
    wanted = {spec.name: spec for spec in graph.inputs}
    if arrays.keys() != wanted.keys():
        odd = sorted(arrays.keys() ^ wanted.keys())
        raise UsageError(f"{graph.name} and its inputs disagree on {', '.join(odd)}", where=path, remedy=remedy)
    for name, array in arrays.items():
        spec = wanted[name]
        if array.shape != spec.shape or array.dtype.name != spec.dtype:
            raise UsageError(
                f"{name} is {array.dtype}{list(array.shape)} where {graph.name} takes {spec.dtype}{list(spec.shape)}",
                where=path,
                remedy=remedy,
            )
    return {spec.name: arrays[spec.name] for spec in graph.inputs}
