"""Which decoders the NPU's graphs express, and in which form.

GroupQueryAttention on the NPU (QAIRT 2.51) rotates whole heads: with tables for a part of the head it computes
something else, without a word. So the rows of queries and keys are put in an order in which the channels that pass
unrotated are pairs of their own, with angle 0. Scores are sums over channels and do not depend on their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgephi.devices.hexagon import HexagonTarget
from edgephi.errors import UnsupportedModelError
from edgephi.export.npu.static_graph import Stage
from edgephi.export.spec import Architecture, DecoderSpec, Part, Weight


@dataclass(frozen=True)
class NpuDecoder:
    """A decoder in the NPU's form."""

    outer: Architecture
    """What stays on the CPU: embedding and head."""
    inner: Architecture
    """The layers and the final norm, with a rope of `cache_rows` positions."""
    cache_rows: int
    context_length: int
    """Tokens of prompt and answer together."""

    @property
    def whole(self) -> Architecture:
        """Both parts, the layers in the NPU's form."""
        return Architecture(self.inner.spec, {**self.outer.weights, **self.inner.weights})


def npu_decoder(architecture: Architecture, target: HexagonTarget) -> NpuDecoder:
    """Divide a decoder between NPU and CPU.

    Raises:
        UnsupportedModelError: the NPU's graphs do not express it.
    """
    spec = architecture.spec
    require_expressible(spec)
    rows = _cache_rows(spec, target)
    # one rope serves the whole cache: the cache ends before the length at which a longer one would take over
    spec = replace(spec, context_length=rows, long_rope=None)
    outside = {"embed.weight", "head.weight", "head.bias", "head_input.weight", "head_input.bias"}
    outer = {name: weight for name, weight in architecture.weights.items() if name in outside}
    inner = {name: weight for name, weight in architecture.weights.items() if name not in outside}
    layers = rotate_whole_heads(Architecture(spec, inner))
    return NpuDecoder(Architecture(spec, outer), layers, rows, rows - target.chunk)


def rotate_whole_heads(architecture: Architecture) -> Architecture:
    """The same decoder with a rope for all channels of a head, some of which stand still; the head's order changes."""
    spec = architecture.spec
    if spec.rope.dim == spec.head_dim:
        return architecture
    names = [f"layers.{layer}.qkv.weight" for layer in range(spec.layers)]
    turned = {name: _whole_heads(architecture.weights[name], spec) for name in names}
    rope = replace(spec.rope, still_pairs=(spec.head_dim - spec.rope.dim) // 2)
    return Architecture(replace(spec, rope=rope), architecture.weights | turned)


def stages(spec: DecoderSpec, target: HexagonTarget, cache_rows: int) -> tuple[Stage, ...]:
    """The stages to compile, those for the prompt first; as many layers to a binary as the target names."""
    step = target.layers_per_binary
    ranges = [(first, min(first + step, spec.layers)) for first in range(0, spec.layers, step)]
    pieces = (target.chunk, 1) if target.tokens_on == "npu" else (target.chunk,)
    return tuple(Stage(first, last, tokens, cache_rows) for tokens in pieces for first, last in ranges)


def require_expressible(spec: DecoderSpec) -> None:
    """Raises UnsupportedModelError naming the first thing the NPU's graphs do not express."""
    reasons = (
        (spec.experts is not None, "has experts"),
        (spec.mlp != "gated_silu", f"has an MLP of the kind {spec.mlp}"),
        (spec.norm != "rms", "has LayerNorm where RMSNorm is expected"),
        (spec.parallel, "computes attention and MLP in parallel"),
        (spec.block_sparse is not None, "has block-sparse attention"),
        (spec.qkv_bias or spec.output_bias or spec.mlp_bias, "has biases in its linear layers"),
        ((spec.head_dim - spec.rope.dim) % 4 != 0, f"leaves {spec.head_dim - spec.rope.dim} channels unrotated"),
    )
    for holds, reason in reasons:
        if holds:
            raise UnsupportedModelError(
                f"the model {reason}, which edgephi's NPU graphs do not express",
                where=spec.family,
                remedy="Export it for the CPU, without --device",
            )


def _cache_rows(spec: DecoderSpec, target: HexagonTarget) -> int:
    """The longest cache in which nothing changes with the length: one rope, no window, whole chunks."""
    limits = {"context": spec.context_length}
    if spec.sliding_window is not None:
        limits["sliding window"] = spec.sliding_window
    if spec.long_rope is not None:
        limits["short rope"] = spec.long_rope.switch
    shortest = min(limits, key=lambda limit: limits[limit])
    rows = min(target.cache_rows, limits[shortest]) // target.chunk * target.chunk
    if rows < 2 * target.chunk:
        raise UnsupportedModelError(
            f"the model's {shortest} is {limits[shortest]} tokens, and the NPU's graphs need {2 * target.chunk}",
            where=spec.family,
            remedy="Export it for the CPU, without --device",
        )
    return rows


def _whole_heads(weight: Weight, spec: DecoderSpec) -> Weight:
    """Rows of queries and keys with the unrotated channels split between the two halves of each head."""
    turning, rest = spec.rope.dim // 2, (spec.head_dim - spec.rope.dim) // 2
    edges = [0, turning, 2 * turning, 2 * turning + rest, spec.head_dim]
    parts: list[Part] = []
    for head in range(spec.heads + spec.kv_heads):
        for piece in (0, 2, 1, 3):
            first = head * spec.head_dim
            parts += _rows(weight.parts, first + edges[piece], first + edges[piece + 1])
    values = (spec.heads + spec.kv_heads) * spec.head_dim
    parts += _rows(weight.parts, values, weight.shape[0])
    return replace(weight, parts=tuple(parts))


def _rows(parts: Sequence[Part], start: int, stop: int) -> list[Part]:
    """Rows `start` to `stop` of stacked parts."""
    found, row = [], 0
    for part in parts:
        count = part.stop - part.start
        first, last = max(start - row, 0), min(stop - row, count)
        if first < last:
            found.append(Part(part.tensor, part.start + first, part.start + last))
        row += count
    return found
