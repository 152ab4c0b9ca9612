"""Decoder layers, for every graph that has any: whole decoders, single layers of calibration, and the NPU's stages.

Everything a layer computes is decided here, by the specification alone. How an operation is written for a target is the
builder's affair: see the traits of `GraphBuilder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgephi.export.graph.attention import attention
from edgephi.export.graph.builder import GraphBuilder, KvCache
from edgephi.export.graph.mlp import mlp
from edgephi.export.graph.norms import add_and_norm, first_norm
from edgephi.export.graph.positions import Positions
from edgephi.export.spec import DecoderSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def decoder_layers(
    emit: GraphBuilder, spec: DecoderSpec, hidden: ir.Value, caches: Mapping[int, KvCache], positions: Positions
) -> tuple[ir.Value, ir.Value]:
    """Consecutive layers, one for each cache; returns what `decoder_layer` does for the last.

    Args:
        hidden: the residual stream, [batch, length, hidden].
        caches: by the layer's number, in order.
    """
    normed, update = first_norm(emit, spec, next(iter(caches)), hidden), hidden
    for layer, cache in caches.items():
        hidden, update = decoder_layer(emit, spec, layer, hidden, normed, cache, positions)
        if layer + 1 in caches:
            hidden, normed = add_and_norm(emit, spec, f"layers.{layer + 1}.input_norm", hidden, update)
    return hidden, update


def decoder_layer(
    emit: GraphBuilder,
    spec: DecoderSpec,
    layer: int,
    hidden: ir.Value,
    normed: ir.Value,
    cache: KvCache,
    positions: Positions,
) -> tuple[ir.Value, ir.Value]:
    """One layer: the residual stream, and what is to be added to it.

    The caller adds them, because for most targets one operator adds and computes the norm that follows.

    Args:
        hidden: the residual stream, [batch, length, hidden].
        normed: its norm, which attention reads.
    """
    attended = attention(emit, spec, layer, normed, cache, positions)
    if spec.parallel:
        return hidden, emit.op("Add", f"/model/layers.{layer}/Add", [attended, mlp(emit, spec, layer, normed)])
    hidden, normed = add_and_norm(emit, spec, f"layers.{layer}.post_norm", hidden, attended)
    return hidden, mlp(emit, spec, layer, normed)
