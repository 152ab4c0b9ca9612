"""The bundle: a folder stock onnxruntime-genai loads as it is, plus `edgephi.json`, which says what is in it and why.

Everything in `edgephi.json` comes from a stranger when the folder does, so it is validated before it is believed:
unknown keys, paths that leave the folder and sizes that disagree with the disk are errors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from edgephi.errors import BundleError, OutputError
from edgephi.npu_facts import NpuFacts as NpuFacts
from edgephi.npu_facts import NpuNumerics as NpuNumerics
from edgephi.npu_facts import NpuProof as NpuProof
from edgephi.npu_facts import NpuStage as NpuStage
from edgephi.records import Finite, RelativePath, Sha256, Strict, first_problem

MANIFEST = "edgephi.json"
GENAI_CONFIG = "genai_config.json"

ROPE_SWITCH = "rope_switch"
"""Graph input of a model with two ropes, int64 [1] and optional: the longest sequence that takes the short one."""
LONG_ROPE_ADAPTER = "long_rope.onnx_adapter"
"""An onnxruntime adapter that sets this input to 0; through it onnxruntime-genai computes long prompts in pieces."""

# A load hashes what is small and decides behaviour (graph, configuration, tokenizer). Gigabytes of weights are hashed
# by `edgephi verify`, because reading them all would cost more than the load.
HASH_AT_LOAD_UP_TO = 32 * 2**20
MANIFEST_LIMIT = 4 * 2**20


class FileEntry(Strict):
    """One file of the bundle."""

    path: RelativePath
    bytes: int = Field(ge=0)
    sha256: Sha256


class Source(Strict):
    """Where the weights came from."""

    kind: Literal["folder", "hub", "gguf"]
    name: str = Field(description="hub id, or the name of the folder or file; never a path of the exporting machine")
    revision: str | None = Field(default=None, description="commit of the hub repository")
    files: tuple[FileEntry, ...] = Field(description="the weight files that were read, with their hashes")


class ModelFacts(Strict):
    """What the model is, for people and for tools that do not want to parse the graph."""

    family: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int | None
    vocabulary_size: int
    context_length: int
    sliding_window: int | None
    tied_embedding: bool
    parameters: int = Field(description="published parameters; a tied embedding counts once")
    rope_switch: int | None = Field(
        default=None, ge=1, description="longest sequence that takes the short rope, in a model with two (LongRoPE)"
    )


class WeightRecipe(Strict):
    """How one group of weights is stored."""

    weights: str = Field(description="which: 'linear', 'expert', 'router', 'embedding', 'head', 'other'")
    bits: float = Field(description="bits of a code: 4, 8, 16 or 32")
    block_size: int | None
    symmetric: bool | None
    method: str
    parameters: int
    stored_bytes: int
    names: str | None = Field(
        default=None, description="under a budget: modules and their layers, such as 'qkv 0-3, 7; down 5'"
    )


class QuantizationChoice(Strict):
    """Who decided the codes of the 4-bit weights, and why."""

    asked: str = Field(description="the argument: 'auto' or the name of a method")
    picked: str
    reason: str


class CalibrationText(Strict):
    """What a quantizer was fitted to."""

    text: str = Field(description="name of the file, or that the model sampled it")
    tokens: int = Field(ge=1)
    sha256: Sha256 = Field(description="of the token ids, int64, little-endian")
    seed: int | None = Field(description="of the sampling")


class BudgetFacts(Strict):
    """What the bundle was to take, in bits a weight or in bytes of its data file, and how formats were chosen."""

    bits: Finite | None
    bytes: int | None
    measure: str | None = Field(description="of the error a weight's format causes; None: no weight was open")


class Recipe(Strict):
    """The exact arguments that made the bundle; the same recipe on the same source gives the same bytes."""

    precision: Literal["int4", "int8", "fp16", "fp32"]
    accuracy_level: int | None = Field(description="MatMulNBits: 4 computes with int8 activations, 1 with float32")
    quantize: QuantizationChoice | None = Field(default=None, description="for int4")
    rotation_seed: int | None = Field(
        default=None, ge=0, description="of the rotation folded into the weights; none: they are not rotated"
    )
    budget: BudgetFacts | None = None
    weights: tuple[WeightRecipe, ...]
    calibration: CalibrationText | None = None


GraphDevice = Annotated[str, Field(pattern="^[a-z][a-z0-9-]{0,31}$")]
"""Short name of an execution provider; `edgephi.devices.providers.require_known_graphs` refuses unknown ones."""


class GraphEntry(Strict):
    """A graph and the device class it was built for. All graphs of a bundle read the same data file."""

    device: GraphDevice
    file: RelativePath
    computes_in: Literal["float32", "float16"] | None = Field(
        default=None, description="type of activations, KV cache and logits; None: written before this was recorded"
    )
    last_row: RelativePath | None = Field(default=None, description="the same with logits of the last token only")


class MeasuredText(Strict):
    """A text, and how much of it was read: `windows` pieces of `window_length` tokens from its beginning."""

    name: str
    sha256: Sha256
    windows: int = Field(ge=1)
    window_length: int = Field(ge=2)


class GoldenAnswer(Strict):
    """What the bundle answered, greedily, to a prompt that was not put through a chat template."""

    prompt: str
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    token_ids: tuple[int, ...] = Field(min_length=1)
    margins: tuple[Finite, ...] = Field(description="logit of each token less that of the second best")

    @model_validator(mode="after")
    def _one_margin_a_token(self) -> GoldenAnswer:
        if len(self.margins) != len(self.token_ids):
            raise ValueError(f"{len(self.token_ids)} golden tokens have {len(self.margins)} margins")
        return self


class Quality(Strict):
    """The quality contract: what the bundle measured and answered when it was recorded. KL divergences in nats."""

    text: MeasuredText
    perplexity: Finite = Field(gt=0)
    against: str | None = Field(description="name of the float model that kl and top-1 refer to")
    against_perplexity: Finite | None
    kl_mean: Finite | None
    kl_p99: Finite | None
    top1_agreement: Finite | None = Field(ge=0, le=1)
    providers: tuple[str, ...] = Field(description="execution providers that took nodes, the one with most nodes first")
    versions: dict[str, str] = Field(description="libraries that took part")
    golden: tuple[GoldenAnswer, ...] = Field(min_length=1)


class Manifest(Strict):
    """The content of edgephi.json."""

    format: Literal[1] = 1
    edgephi: str = Field(description="version that wrote the bundle")
    exporter: Literal["edgephi", "optimum"] = Field(default="edgephi", description="who built the graph")
    versions: dict[str, str] = Field(description="libraries that took part")
    source: Source
    model: ModelFacts
    recipe: Recipe
    graphs: tuple[GraphEntry, ...]
    npu: NpuFacts | None = Field(default=None, description="for the graphs of a Hexagon NPU")
    files: tuple[FileEntry, ...]
    quality: Quality | None = Field(default=None, description="written by `edgephi evaluate --record`")

    @model_validator(mode="after")
    def _one_graph_a_device(self) -> Manifest:
        devices = [graph.device for graph in self.graphs]
        if len(set(devices)) < len(devices):
            raise ValueError("two graphs are for the same device")
        named = {file for graph in self.graphs for file in (graph.file, graph.last_row) if file}
        if missing := named - {entry.path for entry in self.files}:
            raise ValueError(f"the graph {min(missing)!r} is not among the files")
        return self

    def graph_for(self, device: str) -> GraphEntry | None:
        """The graph built for a device class, if there is one."""
        return next((graph for graph in self.graphs if graph.device == device), None)

    @model_validator(mode="after")
    def _npu_files_are_listed(self) -> Manifest:
        if self.npu is not None:
            listed = {entry.path for entry in self.files}
            named = {file for stage in self.npu.stages for file in (stage.graph, stage.binary)}
            if missing := (named | {self.npu.token_graph or self.npu.head}) - listed:
                raise ValueError(f"the NPU's {min(missing)!r} is not among the files")
            if self.npu.stages[-1].last_layer != self.model.layers:
                raise ValueError(f"the NPU's stages end at layer {self.npu.stages[-1].last_layer}")
        return self

    @property
    def stored_bytes(self) -> int:
        """Bytes of every file of the bundle, edgephi.json apart."""
        return sum(entry.bytes for entry in self.files)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes, scales and zero points over published parameters."""
        return 8 * sum(group.stored_bytes for group in self.recipe.weights) / self.model.parameters


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
    beside = folder / f".{MANIFEST}.new"
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(folder / MANIFEST)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(
            f"the manifest could not be written: {error.strerror or error}",
            where=folder / MANIFEST,
            remedy="Free disk space, or make the folder writable",
        ) from error


def read_manifest(folder: Path) -> Manifest:
    """Read and validate edgephi.json.

    Raises:
        BundleError: not a folder, no manifest, or one this version does not understand.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(
            "there is no such bundle", where=folder, remedy="Make one with `edgephi export SOURCE --output DIR`"
        )
    if not path.is_file():
        raise BundleError(
            f"this folder has no {MANIFEST}", where=folder, remedy="Name a folder that `edgephi export` wrote"
        )
    if path.stat().st_size > MANIFEST_LIMIT:
        raise BundleError("the manifest is implausibly large", where=path, remedy="Export the model again")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleError(
            f"the manifest cannot be used: {first_problem(error)}",
            where=path,
            remedy="Export the model again, or update edgephi if a newer version wrote it",
        ) from error


def check_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    every_byte: bool,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Compare the folder with its manifest: every file present and of its size; hashes of all files, or of small ones.

    Raises:
        BundleError: naming the first file that differs.
    """
    root = folder.resolve()
    for entry in manifest.files:
        path = folder / entry.path
        if not path.resolve().is_relative_to(root):
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
                remedy="Copy it again, or export the model again",
            )
        if (every_byte or size <= HASH_AT_LOAD_UP_TO) and sha256_of(path, on_bytes) != entry.sha256:
            raise BundleError(
                "a file of the bundle was changed: its SHA-256 is not the manifest's",
                where=path,
                remedy="Copy it again, or export the model again",
            )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed."""
    return sum(os.lstat(path).st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
