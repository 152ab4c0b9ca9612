"""The feed-forward half of a decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.export.graph.builder import Emitter
from edgephi.export.graph.gegelu import gegelu_mlp
from edgephi.export.graph.moe import experts_mlp
from edgephi.export.spec import DecoderSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def mlp(emit: Emitter, spec: DecoderSpec, layer: int, normed: ir.Value) -> ir.Value:
    """[batch, length, hidden] to the same shape, by the kind of MLP the spec names."""
    match spec.mlp:
        case "gated_silu":
            return _gated_mlp(emit, layer, normed)
        case "gelu_tanh":
            return _gelu_mlp(emit, layer, normed)
        case "gegelu":
            return gegelu_mlp(emit, spec, layer, normed)
        case "experts":
            return experts_mlp(emit, spec, layer, normed)


def _gated_mlp(emit: Emitter, layer: int, normed: ir.Value) -> ir.Value:
    """down(silu(gate(x)) · up(x)); gate and up are one matrix, gate first."""
    base = f"/model/layers.{layer}/mlp"
    both = emit.linear(f"{base}/gate_up_proj", normed, f"layers.{layer}.gate_up.weight", f"layers.{layer}.gate_up.bias")
    gate, up = emit.value(f"{base}/Split/output_0"), emit.value(f"{base}/Split/output_1")
    emit.node("Split", f"{base}/Split", [both], [gate, up], {"axis": -1, "num_outputs": 2})
    # x · sigmoid(x) is SiLU; onnxruntime fuses the pair
    sigmoid = emit.op("Sigmoid", f"{base}/act_fn/Sigmoid", [gate])
    activated = emit.op("Mul", f"{base}/act_fn/Mul", [gate, sigmoid])
    gated = emit.op("Mul", f"{base}/Mul", [activated, up])
    return emit.linear(f"{base}/down_proj", gated, f"layers.{layer}.down.weight", f"layers.{layer}.down.bias")


def _gelu_mlp(emit: Emitter, layer: int, normed: ir.Value) -> ir.Value:
    """down(gelu(up(x))), gelu by its tanh approximation (Hendrycks and Gimpel 2016), which transformers calls gelu_new.

    ONNX's own Gelu gives the values of com.microsoft.FastGelu in two thirds of its time (float32, CPU provider).
    """
    base = f"/model/layers.{layer}/mlp"
    up = emit.linear(f"{base}/up_proj", normed, f"layers.{layer}.up.weight", f"layers.{layer}.up.bias")
    activated = emit.op("Gelu", f"{base}/act_fn/Gelu", [up], {"approximate": "tanh"})
    return emit.linear(f"{base}/down_proj", activated, f"layers.{layer}.down.weight", f"layers.{layer}.down.bias")
