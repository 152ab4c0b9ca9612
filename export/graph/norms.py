"""Normalization of the residual stream: RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016).

onnxruntime's name for RMSNorm is SimplifiedLayerNormalization.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.export.graph.builder import MS, Emitter
from edgephi.export.spec import DecoderSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def first_norm(emit: Emitter, spec: DecoderSpec, hidden: ir.Value) -> ir.Value:
    """The norm in front of layer 0, the only one without a block's output to add."""
    return normalize(emit, spec, "layers.0.input_norm", "/model/layers.0/input_layernorm/LayerNorm", hidden)


def add_and_norm(
    emit: Emitter, spec: DecoderSpec, norm: str, hidden: ir.Value, update: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """(hidden + update, its norm); after the last layer nobody reads the sum."""
    base = "/model/final_norm" if norm == "norm" else f"/model/{norm}"
    if spec.norm == "layer":
        # in prefill SkipLayerNormalization takes 8 to 11 times as long on the CPU provider of 1.31, and it errs more
        total = emit.op("Add", f"{base}/Add", [hidden, update])
        return total, normalize(emit, spec, norm, f"{base}/LayerNorm", total)
    name = f"{base}/SkipLayerNorm"
    normed, total = emit.value(f"{name}/output_0"), emit.value(f"{name}/output_3")
    outputs = [normed] if norm == "norm" else [normed, emit.absent(), emit.absent(), total]
    inputs = [hidden, update, emit.vector(f"{norm}.weight")]
    emit.node("SkipSimplifiedLayerNormalization", name, inputs, outputs, {"epsilon": spec.norm_epsilon}, MS)
    return total, normed


def normalize(
    emit: Emitter, spec: DecoderSpec, norm: str, name: str, hidden: ir.Value, output: ir.Value | None = None
) -> ir.Value:
    """The norm of that canonical name, as a node called `name`."""
    op, inputs = "SimplifiedLayerNormalization", [hidden, emit.vector(f"{norm}.weight")]
    if spec.norm == "layer":
        op, inputs = "LayerNormalization", [*inputs, emit.vector(f"{norm}.bias")]
    return emit.op(op, name, inputs, {"axis": -1, "epsilon": spec.norm_epsilon, "stash_type": 1}, output=output)
