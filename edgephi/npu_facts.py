"""The manifest's record of graphs that were compiled for an NPU."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from edgephi.records import Finite, RelativePath, Strict

NpuNumerics = Literal["float16", "w4a16"]
KvCacheType = Literal["float16", "uint8"]
_MANY = 2**31 - 1


class NpuProof(Strict):
    """A compiled graph ran in the process that compiled it, on random numbers, beside onnxruntime's CPU kernels."""

    ran_on: Literal["npu", "npu-simulator"]
    tokens: int = Field(
        ge=1, le=_MANY, description="computed at once; a token graph's stands behind those of the prompt graph"
    )
    hidden_error: Finite = Field(ge=0, description="of hidden states: length of the difference over the CPU's length")
    cache_error: Finite = Field(ge=0, description="the same of all keys and values")


class NpuStage(Strict):
    """Consecutive layers, compiled for a Hexagon NPU: a graph of one node and the context binary it runs."""

    name: str = Field(description="of the graph in the binary")
    phase: Literal["prefill", "decode"]
    first_layer: int = Field(ge=0, le=4096)
    last_layer: int = Field(ge=1, le=4096, description="the first layer after the stage")
    graph: RelativePath
    binary: RelativePath
    nodes: int = Field(ge=1, le=_MANY, description="nodes that were compiled: all there were")
    compile_seconds: Finite = Field(ge=0)
    compile_peak_bytes: int = Field(ge=0, le=2**53, description="most memory the compiling process held")
    proof: NpuProof | None = Field(
        default=None, description="of a graph whose binary the simulator cannot load again; none: it was not run"
    )


class NpuFacts(Strict):
    """What the graphs of a Hexagon NPU were built for. The SHA-256 of their files are in the manifest's `files`."""

    target: str = Field(description="what `edgephi export --device` was given")
    numerics: NpuNumerics = Field(
        description="of the linear layers: float16, or int4 and int8 weights times 16-bit activations"
    )
    kv_cache: KvCacheType = Field(
        default="float16",
        description="what is kept of keys and values between two runs; scales of uint8 are in the graphs",
    )
    htp_arch: int = Field(ge=1, le=999)
    soc_model: int = Field(ge=1, le=9999, description="QAIRT's number of the chip")
    qairt: str = Field(
        pattern=r"^\d{1,6}(\.\d{1,6})+$", description="version of Qualcomm's AI Runtime that compiled the binaries"
    )
    chunk: int = Field(ge=2, le=2**20, description="tokens of a prompt that are computed at once")
    cache_rows: int = Field(ge=1, le=2**24, description="tokens the KV cache has room for")
    context_length: int = Field(ge=1, le=2**24, description="tokens of prompt and answer together")
    embedding: RelativePath = Field(description="graph on the CPU: token ids to hidden states")
    head: RelativePath = Field(description="graph on the CPU: hidden states to logits")
    stages: tuple[NpuStage, ...] = Field(min_length=1, max_length=1024)
    token_graph: RelativePath | None = Field(
        default=None,
        description="graph on the CPU of all layers for a token, over the same KV cache; "
        "none: the stages of phase decode",
    )

    shares_weights: bool = Field(
        default=False,
        description="prompt and token graphs of the same layers are in one binary, which the simulator cannot load",
    )

    @property
    def tokens_on(self) -> Literal["npu", "cpu"]:
        """Who computes the answer's tokens; a prompt is the NPU's."""
        return "npu" if self.token_graph is None else "cpu"

    @model_validator(mode="after")
    def _whole(self) -> NpuFacts:
        phases = ("prefill", "decode") if self.token_graph is None else ("prefill",)
        if undeclared := {stage.phase for stage in self.stages} - set(phases):
            raise ValueError(f"there are two graphs for {min(undeclared)}")
        last = dict.fromkeys(phases, 0)
        for phase in last:
            ends = [0, *(stage.last_layer for stage in self.stages if stage.phase == phase)]
            starts = [stage.first_layer for stage in self.stages if stage.phase == phase]
            if len(ends) < 2 or starts != ends[:-1] or ends != sorted(set(ends)):
                raise ValueError(f"the stages of {phase} are not consecutive layers")
            last[phase] = ends[-1]
        if len(set(last.values())) > 1:
            raise ValueError("the two phases end at different layers")
        users: dict[str, list[tuple[int, int]]] = {}
        for stage in self.stages:
            users.setdefault(stage.binary, []).append((stage.first_layer, stage.last_layer))
        for binary, layers in users.items():
            if len(layers) != 1 + self.shares_weights or len(set(layers)) > 1:
                raise ValueError(f"{binary} is shared by other stages than the manifest says")
        if self.cache_rows % self.chunk or self.context_length + self.chunk > self.cache_rows:
            raise ValueError(f"a context of {self.context_length} does not fit a cache of {self.cache_rows}")
        return self
