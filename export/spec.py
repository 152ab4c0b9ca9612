"""Plain data between the stages of an export: what the decoder is, and where each of its weights lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding in NeoX layout (first half of the rotated part pairs with its second half).

    cos and sin of position p are `scale * cos(p * inv_freq)` and `scale * sin(p * inv_freq)`.
    Source: Su et al. 2021, "RoFormer"; the scaled variants are named in `export/rope.py`.
    """

    dim: int
    """Rotated channels of a head (even); the rest of the head passes unrotated."""
    inv_freq: tuple[float, ...]
    """dim / 2 angles per position, radians."""
    scale: float = 1.0


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer with pre-normalization, gated MLP and grouped-query attention.

    It holds all a graph needs to know, and no weights.
    """

    family: str
    """Name of the file in `export/families` that read it."""
    genai_type: str
    """`model.type` in genai_config.json; onnxruntime-genai looks its behaviour up by it."""
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary_size: int
    context_length: int
    norm_epsilon: float
    rope: Rope
    sliding_window: int | None
    """A position attends to itself and the `sliding_window - 1` before it; None: to all before it."""
    tied_embedding: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a checkpoint file: enough to read a slice of its rows, and nothing read yet."""

    name: str
    file: Path
    offset: int
    bytes: int
    shape: tuple[int, ...]
    storage: str
    """safetensors dtype ("BF16") or GGUF type ("Q4_1")."""
    interleaved_head_dim: int | None = None
    """GGUF stores rotary pairs of the llama family side by side; reading restores halves within heads of this size."""


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of one checkpoint tensor."""

    tensor: TensorRef
    start: int
    stop: int


@dataclass(frozen=True)
class Weight:
    """A canonical weight of the decoder: parts of checkpoint tensors, stacked along rows."""

    name: str
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    role: Literal["linear", "embedding", "head", "vector"]


@dataclass(frozen=True)
class Architecture:
    """What a family file returns: the decoder and all its weights, by canonical name.

    Canonical names: `embed.weight`, `layers.N.input_norm.weight`, `layers.N.qkv.weight|bias`, `layers.N.o.weight|bias`,
    `layers.N.post_norm.weight`, `layers.N.gate_up.weight|bias`, `layers.N.down.weight|bias`, `norm.weight`,
    `head.weight` (absent when tied). Linear weights are [rows = outputs, columns = inputs].
    """

    spec: DecoderSpec
    weights: dict[str, Weight]

    @property
    def parameters(self) -> int:
        total = 0
        for weight in self.weights.values():
            count = 1
            for size in weight.shape:
                count *= size
            total += count
        return total


@dataclass(frozen=True)
class Checkpoint:
    """A published model as it lies on disk: its configuration and its tensors, none of them read."""

    kind: Literal["folder", "hub", "gguf"]
    name: str
    revision: str | None
    config: dict[str, object]
    """config.json, or GGUF metadata put in the same words."""
    config_where: str
    tensors: dict[str, TensorRef]
    files: tuple[Path, ...]
    """The weight files, in reading order."""
    folder: Path | None
    """Where tokenizer files lie; None for a GGUF file, which carries its own."""
    gguf_metadata: dict[str, object] | None = None
