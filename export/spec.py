"""Plain data between the stages of an export: what the decoder is, and where each of its weights lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding in NeoX layout (first half of the rotated part pairs with its second half).

    cos and sin of position p are `scale * cos(p * inv_freq)` and `scale * sin(p * inv_freq)`.
    Source: Su et al. 2021, "RoFormer"; the scaled variants are named in `export/families/rope.py`.
    """

    dim: int
    """Rotated channels of a head (even); the rest of the head passes unrotated."""
    inv_freq: tuple[float, ...]
    """dim / 2 angles per position, radians."""
    scale: float = 1.0
    still_pairs: int = 0
    """Pairs after the turning ones that the tables hold as well, cos 1 and sin 0: some operators take whole heads."""


@dataclass(frozen=True)
class LongRope:
    """What replaces the rope of a sequence, at all its positions, once it is longer than `switch` tokens."""

    switch: int
    rope: Rope


@dataclass(frozen=True)
class BlockSparse:
    """Which keys a head looks at in the sparse layers, in blocks of `block_size` positions, causality apart.

    Query block q looks at key block k when k is among the last `local_blocks` up to q, or when k + shift + 1 is a
    multiple of `stride`, with `shifts[h % len(shifts)]` as the shift of head h.
    Source: Abdin et al. 2024, "Phi-3 Technical Report", figure 1.
    """

    block_size: int
    local_blocks: int
    stride: int
    shifts: tuple[int, ...]
    """Their number divides the number of heads."""
    dense_every: int | None
    """Layers whose number, counted from 1, is a multiple of this look at all keys; None: no layer does."""

    def covers(self, layer: int) -> bool:
        """Whether this layer, counted from 0, is a sparse one."""
        return self.dense_every is None or (layer + 1) % self.dense_every != 0


EXPERTS_PER_TOKEN = 2
"""Experts that see a token, in every layer that has any."""


@dataclass(frozen=True)
class Experts:
    """A layer's MLP as `count` gated ones; `export/graph/moe.py` says how the two that see a token are chosen."""

    count: int
    jitter: float
    """How far below the best score, as a fraction of their size, others count in half of a softmax: r in the paper."""


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer with pre-normalization and grouped-query attention.

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
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, a gain only; or LayerNorm, with a bias."""
    mlp: Literal["gated_silu", "gelu_tanh", "gegelu", "experts"] = "gated_silu"
    """down(silu(gate(x)) · up(x)); down(gelu(up(x))) with the tanh approximation of GELU; `export/graph/mlp.py`; or
    experts of the first kind, `intermediate_size` channels each."""
    experts: Experts | None = None
    """Given exactly where `mlp` says so."""
    gegelu_limit: float | None = None
    """What gegelu clamps its inputs to; None: it does not."""
    parallel: bool = False
    """Attention and MLP read the same norm and are added together; otherwise the MLP follows, with its own norm."""
    long_rope: LongRope | None = None
    """None: `rope` serves every length."""
    block_sparse: BlockSparse | None = None
    attention_scale: float | None = None
    """What scores are multiplied by before the softmax; None: head_dim^(-1/2)."""
    embedding_scale: float = 1.0
    head_scale: float = 1.0
    """What the last norm's output is multiplied by before the head."""
    head_input: bool = False
    """A linear layer stands between the last norm and the head; see `export/weights/rotation.py`."""
    suppressed_tokens: tuple[int, ...] = ()
    """Ids whose logit is the lowest number there is: they are in the vocabulary, but never in a text."""

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
class Rotation:
    """A random orthogonal matrix Q [size, size]; see `quantize/hadamard.py`."""

    size: int
    seed: int


@dataclass(frozen=True)
class ScaledColumns:
    """W · diag(gain)."""

    gain: Weight


@dataclass(frozen=True)
class RotatedColumns:
    """W · Q for every `rotation.size` columns; `centered`: each row less its mean before."""

    rotation: Rotation
    centered: bool = False


@dataclass(frozen=True)
class RotatedRows:
    """Qᵀ · W for every `rotation.size` rows from `start` on; `centered`: each column less its mean before."""

    rotation: Rotation
    start: int = 0
    centered: bool = False


@dataclass(frozen=True)
class AddedProduct:
    """b + factor · W · vector, of the weights as the checkpoint has them."""

    matrix: Weight
    vector: Weight
    factor: float = 1.0


@dataclass(frozen=True)
class Ones:
    """1 in place of every value."""


@dataclass(frozen=True)
class Diagonal:
    """A vector as a diagonal matrix."""


Fold = ScaledColumns | RotatedColumns | RotatedRows | AddedProduct | Ones | Diagonal
"""One step of what is done to a weight's values after they are read; `export/weights/transforms.py` does it."""


HEAD = "head.weight"
"""The head's canonical name; a decoder without it multiplies by its embedding."""


@dataclass(frozen=True)
class Weight:
    """A canonical weight of the decoder: parts of checkpoint tensors, stacked along rows, then folded."""

    name: str
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    role: Literal["linear", "expert", "router", "embedding", "head", "vector"]
    """A router is never quantized: its scores decide by their order which expert is read."""
    interleaved: bool = False
    """Rows of the parts alternate: the first of each, then the second of each. The parts are the same rows."""
    folds: tuple[Fold, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """What a family file returns: the decoder and all its weights, by canonical name.

    Canonical names: `embed.weight`, `layers.N.input_norm.weight|bias`, `layers.N.qkv.weight|bias`,
    `layers.N.o.weight|bias`, `layers.N.post_norm.weight|bias`, `layers.N.gate_up.weight|bias` or
    `layers.N.up.weight|bias`, `layers.N.down.weight|bias`, `norm.weight|bias`, `head.weight` (absent when tied),
    `head.bias`, `head_input.weight|bias` (see `DecoderSpec.head_input`). In place of an MLP: `layers.N.router.weight`
    and for every expert E `layers.N.experts.E.gate_up.weight` (rows of gate and up alternate) and
    `layers.N.experts.E.down.weight`.
    Linear weights are [rows = outputs, columns = inputs].
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
