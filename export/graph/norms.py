"""Normalization of the residual stream: RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016).

onnxruntime's name for RMSNorm is SimplifiedLayerNormalization.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.export.graph.builder import MS, GraphBuilder
from edgephi.export.spec import DecoderSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def first_norm(emit: GraphBuilder, spec: DecoderSpec, layer: int, hidden: ir.Value) -> ir.Value:
    """The norm in front of a graph's first layer, the only one without a block's output to add."""
    return normalize(
        emit, spec, f"layers.{layer}.input_norm", f"/model/layers.{layer}/input_layernorm/LayerNorm", hidden
    )


def add_and_norm(
    emit: GraphBuilder,
    spec: DecoderSpec,
    norm: str,
    hidden: ir.Value,
    update: ir.Value,
    output: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value]:
    """(hidden + update, its norm, which is written to `output`); after the last layer nobody reads the sum."""
    base = "/model/final_norm" if norm == "norm" else f"/model/{norm}"
    # in prefill SkipLayerNormalization takes 8 to 11 times as long on the CPU provider of 1.31, and it errs more
    if spec.norm == "layer" or not emit.fused_norms:
        total = emit.op("Add", f"{base}/Add", [hidden, update])
        return total, normalize(emit, spec, norm, f"{base}/LayerNorm", total, output)
    name = f"{base}/SkipLayerNorm"
    normed, total = output or emit.value(f"{name}/output_0"), emit.value(f"{name}/output_3")
    outputs = [normed] if norm == "norm" else [normed, emit.absent(), emit.absent(), total]
    inputs = [hidden, update, emit.vector(f"{norm}.weight")]
    emit.node("SkipSimplifiedLayerNormalization", name, inputs, outputs, {"epsilon": spec.norm_epsilon}, MS)
    return total, normed


def normalize(
    emit: GraphBuilder, spec: DecoderSpec, norm: str, name: str, hidden: ir.Value, output: ir.Value | None = None
) -> ir.Value:
    """The norm of that canonical name, as a node called `name`."""
    op, inputs = "SimplifiedLayerNormalization", [hidden, emit.vector(f"{norm}.weight")]
    if spec.norm == "layer":
        op, inputs = "LayerNormalization", [*inputs, emit.vector(f"{norm}.bias")]
    return emit.op(op, name, inputs, {"axis": -1, "epsilon": spec.norm_epsilon, "stash_type": 1}, output=output)
