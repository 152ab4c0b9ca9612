"""The content of edgephi.json, as strict records: unknown keys, numbers out of bounds and paths that leave the folder
are errors. `edgephi/bundle.py` reads and writes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from edgephi.npu_facts import NpuFacts
from edgephi.records import Finite, RelativePath, Sha256, Strict, portable_problem, spelt_alike

MANIFEST = "edgephi.json"
MOST_FILES = 2048
"""Of a bundle. Those that edgephi writes have ten; one for an NPU has some for each layer."""

Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Versions = Annotated[dict[str, str], Field(max_length=1000)]


class FileEntry(Strict):
    """One file of the bundle."""

    path: RelativePath
    bytes: Count
    sha256: Sha256


class Source(Strict):
    """Where the weights came from."""

    kind: Literal["folder", "hub", "gguf"]
    name: str = Field(description="hub id, or the name of the folder or file; never a path of the exporting machine")
    revision: str | None = Field(default=None, description="commit of the hub repository")
    files: tuple[FileEntry, ...] = Field(
        max_length=100_000, description="the weight files that were read, with their hashes"
    )


class ModelFacts(Strict):
    """What the model is, for people and for tools that do not want to parse the graph."""

    family: str
    hidden_size: Size
    layers: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    intermediate_size: Size | None
    vocabulary_size: Size
    context_length: Size
    sliding_window: Size | None
    tied_embedding: bool
    parameters: Positive = Field(description="published parameters; a tied embedding counts once")
    rope_switch: Size | None = Field(
        default=None, description="longest sequence that takes the short rope, in a model with two (LongRoPE)"
    )


class WeightRecipe(Strict):
    """How one group of weights is stored."""

    weights: str = Field(description="which: 'linear', 'expert', 'router', 'embedding', 'head', 'other'")
    bits: Finite = Field(ge=0, le=64, description="bits of a code: 4, 8, 16 or 32")
    block_size: Size | None
    symmetric: bool | None
    method: str
    parameters: Count
    stored_bytes: Count
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
    tokens: Positive
    sha256: Sha256 = Field(description="of the token ids, int64, little-endian")
    seed: int | None = Field(description="of the sampling")


class BudgetFacts(Strict):
    """What the bundle was to take, in bits a weight or in bytes of its data file, and how formats were chosen."""

    bits: Finite | None
    bytes: Count | None
    measure: str | None = Field(description="of the error a weight's format causes; None: no weight was open")


class KvCacheChoice(Strict):
    """The type of the KV cache in the CPU's graph with `logit_rows`, and why."""

    asked: Literal["auto", "int8", "float"]
    picked: Literal["int8", "float"] = Field(description="float: the type that the graph computes in")
    reason: str
    kl_mean: Finite | None = Field(
        default=None, ge=0, description="mean KL divergence in nats from the predictions with a float cache"
    )
    kl_tokens: Positive | None = Field(default=None, description="that it was measured on; no scale is fitted to them")
    calibration: CalibrationText | None = Field(default=None, description="what the scales were fitted to")


class RecipeRecord(Strict):
    """The exact arguments that made the bundle; the same recipe on the same source gives the same bytes."""

    precision: Literal["int4", "int8", "fp16", "fp32"]
    accuracy_level: int | None = Field(description="MatMulNBits: 4 computes with int8 activations, 1 with float32")
    quantize: QuantizationChoice | None = Field(default=None, description="for int4")
    rotation_seed: int | None = Field(
        default=None, ge=0, description="of the rotation folded into the weights; none: they are not rotated"
    )
    budget: BudgetFacts | None = None
    weights: tuple[WeightRecipe, ...] = Field(max_length=10_000)
    calibration: CalibrationText | None = None
    kv_cache: KvCacheChoice | None = Field(
        default=None, description="None: no graph had the choice, or written before there was one"
    )


class LoraPart(Strict):
    """Rows of a module of the published checkpoint, which the product computes together with others."""

    module: str = Field(min_length=1, max_length=200, description="name behind its layer: 'self_attn.q_proj'")
    start: Count
    stop: Positive

    @model_validator(mode="after")
    def _has_rows(self) -> LoraPart:
        if self.stop <= self.start:
            raise ValueError(f"rows {self.start} to {self.stop} of {self.module[:80]!r} are none")
        return self


LoraProduct = Literal["attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.up_proj", "mlp.down_proj"]


class LoraTarget(Strict):
    """A product, the same in every layer, that has the inputs `model.layers.N.PRODUCT.lora_A.weight` [inputs, rank]
    and `model.layers.N.PRODUCT.lora_B.weight` [rank, outputs]."""

    product: LoraProduct
    inputs: Size
    outputs: Size
    largest_rank: Size = Field(description="of the inputs; where modules are computed together their ranks add up")
    parts: tuple[LoraPart, ...] = Field(min_length=1, max_length=1000, description="of its outputs, in order")

    @model_validator(mode="after")
    def _parts_are_the_outputs(self) -> LoraTarget:
        if sum(part.stop - part.start for part in self.parts) != self.outputs:
            raise ValueError(f"the parts of {self.product} are not its {self.outputs} outputs")
        return self


class LoraFacts(Strict):
    """What adapters fit the CPU's graph with `logit_rows`, which takes them as optional inputs."""

    rank: Size = Field(description="largest one of an adapter, as its training counts it")
    layers: Literal["attention", "mlp", "all"]
    base: Sha256 = Field(description="of the decoder's sizes and the hashes of the source's weights")
    targets: tuple[LoraTarget, ...] = Field(min_length=1, max_length=5)

    @model_validator(mode="after")
    def _every_product_once(self) -> LoraFacts:
        if len({target.product for target in self.targets}) < len(self.targets):
            raise ValueError("a product takes two adapters")
        return self


UNREAD = "it does not read the tokenizer"
"""Begins the one difference of a reader that reads no text at all."""


class TokenizerFacts(Strict):
    """How the tokenizer and the chat template came out of the export's check."""

    compared_with: str | None = Field(description="the other reader and its version; None: not compared")
    differences: tuple[str, ...] = Field(
        default=(), description="texts that it reads as other tokens, or why it reads none"
    )
    dropped_roles: tuple[str, ...] = Field(default=(), description="roles whose messages the template leaves out")
    notes: tuple[str, ...] = Field(default=(), description="what was mended and what could not be")

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of it for a person; empty when there is nothing to know."""
        roles = f"the chat template leaves out {' and '.join(self.dropped_roles)} messages"
        other = f"stock {self.compared_with or 'onnxruntime-genai'}"
        if any(said.startswith(UNREAD) for said in self.differences):
            split = f"{other} cannot use this tokenizer ({'; '.join(self.differences)}); edgephi can"
        else:
            split = (
                f"{other} splits some texts into other tokens than edgephi ({'; '.join(self.differences)}); edgephi "
                "itself follows the published tokenizer"
            )
        return (
            *self.notes,
            *([roles] if self.dropped_roles else []),
            *([split] if self.differences else []),
        )


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
    logit_rows: RelativePath | None = Field(
        default=None, description="the same with an optional input `logit_rows`, which picks the tokens that get logits"
    )
    kv_cache: Literal["int8"] | None = Field(
        default=None, description="type of the KV cache in `logit_rows`; None: that of activations, as in the others"
    )

    @model_validator(mode="after")
    def _a_graph_has_the_cache(self) -> GraphEntry:
        if self.kv_cache is not None and self.logit_rows is None:
            raise ValueError("a KV cache in int8 is said to be of a graph that is not there")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """All graphs of this device."""
        return tuple(file for file in (self.file, self.last_row, self.logit_rows) if file is not None)


class MeasuredText(Strict):
    """A text, and how much of it was read: `windows` pieces of `window_length` tokens from its beginning."""

    name: str
    sha256: Sha256
    windows: Positive
    window_length: int = Field(ge=2, le=2**31 - 1)


class GoldenAnswer(Strict):
    """What the bundle answered, greedily, to a prompt that was not put through a chat template."""

    prompt: str
    prompt_ids: tuple[TokenId, ...] = Field(min_length=1)
    token_ids: tuple[TokenId, ...] = Field(min_length=1)
    margins: tuple[Annotated[Finite, Field(ge=0)], ...] = Field(
        description="logit of each token less that of the second best"
    )

    @model_validator(mode="after")
    def _one_margin_a_token(self) -> GoldenAnswer:
        if len(self.margins) != len(self.token_ids):
            raise ValueError(f"{len(self.token_ids)} golden tokens have {len(self.margins)} margins")
        return self


KvType = Literal["float32", "float16", "int8"]


class Quality(Strict):
    """The quality contract: what the bundle measured and answered when it was recorded. KL divergences in nats."""

    text: MeasuredText
    perplexity: Finite = Field(gt=0)
    against: str | None = Field(description="name of the float model that kl and top-1 refer to")
    against_perplexity: Finite | None
    kl_mean: Finite | None
    kl_p99: Finite | None
    top1_agreement: Finite | None = Field(ge=0, le=1)
    kv_cache: KvType | None = Field(
        default=None, description="type of the KV cache that was measured with; None: written before this was recorded"
    )
    providers: tuple[str, ...] = Field(description="execution providers that took nodes, the one with most nodes first")
    versions: Versions = Field(description="libraries that took part")
    golden: tuple[GoldenAnswer, ...] = Field(min_length=1, max_length=10_000)


class Manifest(Strict):
    """The content of edgephi.json."""

    format: Literal[1] = 1
    edgephi: str = Field(description="version that wrote the bundle")
    exporter: Literal["edgephi", "optimum"] = Field(default="edgephi", description="who built the graph")
    versions: Versions = Field(description="libraries that took part")
    source: Source
    model: ModelFacts
    recipe: RecipeRecord
    graphs: tuple[GraphEntry, ...] = Field(max_length=16)
    npu: NpuFacts | None = Field(default=None, description="for the graphs of a Hexagon NPU")
    lora: LoraFacts | None = Field(default=None, description="None, and not written: the graphs take no adapters")
    tokenizer: TokenizerFacts | None = Field(default=None, description="None: written before this was recorded")
    files: tuple[FileEntry, ...] = Field(max_length=MOST_FILES)
    quality: Quality | None = Field(default=None, description="written by `edgephi evaluate --record`")

    @model_validator(mode="after")
    def _every_file_once_on_every_system(self) -> Manifest:
        for entry in self.files:
            if problem := portable_problem(entry.path):
                raise ValueError(f"the path {entry.path[:200]!r} cannot be used on every system: {problem}")
        if twice := spelt_alike([MANIFEST, *(entry.path for entry in self.files)]):
            raise ValueError(f"two files are called {twice[:200]!r}, or the manifest lists itself")
        return self

    @model_validator(mode="after")
    def _one_graph_a_device(self) -> Manifest:
        devices = [graph.device for graph in self.graphs]
        if len(set(devices)) < len(devices):
            raise ValueError("two graphs are for the same device")
        named = {file for graph in self.graphs for file in graph.files}
        if missing := named - {entry.path for entry in self.files}:
            raise ValueError(f"the graph {min(missing)!r} is not among the files")
        _require_onnx(named)
        return self

    def graph_for(self, device: str) -> GraphEntry | None:
        """The graph built for a device class, if there is one."""
        return next((graph for graph in self.graphs if graph.device == device), None)

    @model_validator(mode="after")
    def _npu_files_are_listed(self) -> Manifest:
        if self.npu is not None:
            listed = {entry.path for entry in self.files}
            named = {file for stage in self.npu.stages for file in (stage.graph, stage.binary)}
            named |= {self.npu.embedding, self.npu.head, self.npu.token_graph or self.npu.head}
            if missing := named - listed:
                raise ValueError(f"the NPU's {min(missing)!r} is not among the files")
            _require_onnx(named - {stage.binary for stage in self.npu.stages})
            if self.npu.stages[-1].last_layer != self.model.layers:
                raise ValueError(f"the NPU's stages end at layer {self.npu.stages[-1].last_layer}")
        return self

    @model_validator(mode="after")
    def _adapters_have_a_graph(self) -> Manifest:
        if self.lora is not None and not any(one.device == "cpu" and one.logit_rows for one in self.graphs):
            raise ValueError("adapters are said to fit a graph that is not there")
        return self

    @model_serializer(mode="wrap")
    def _say_nothing_of_what_was_not_asked_for(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        data: dict[str, object] = write(self)
        if self.lora is None:
            data.pop("lora", None)
        return data

    @property
    def stored_bytes(self) -> int:
        """Bytes of every file of the bundle, edgephi.json apart."""
        return sum(entry.bytes for entry in self.files)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes, scales and zero points over published parameters."""
        return 8 * sum(group.stored_bytes for group in self.recipe.weights) / self.model.parameters


def _require_onnx(graphs: set[str]) -> None:
    """onnxruntime reads a format of its own from files with other endings, and nobody would have looked at those."""
    if wrong := {graph for graph in graphs if not graph.endswith(".onnx")}:
        raise ValueError(f"the graph {min(wrong)!r} is no .onnx file")
