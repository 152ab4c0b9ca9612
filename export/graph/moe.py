"""Two experts a token, chosen and weighted by the sparse mixer of Phi-3.5-MoE.

The mixer's two weights are not the top two of a softmax. The best expert's weight is its probability among the experts
whose score comes close to its own; the second best's is its probability among those that come close to *it*, the best
left out. Both are mostly 1. Source: Liu et al. 2024, "GRIN: GRadient-INformed MoE", appendix; transformers,
modeling_phimoe.py, as evaluated outside of training.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgephi.export.graph.builder import MS, Attributes, GraphBuilder
from edgephi.export.spec import EXPERTS_PER_TOKEN, DecoderSpec, Experts

if TYPE_CHECKING:
    import onnx_ir as ir

# SwiGLU as onnxruntime generalizes it: gate · sigmoid(alpha · gate) · (up + beta), gates in even channels
_SWIGLU: Attributes = {
    "k": EXPERTS_PER_TOKEN,
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}


def experts_mlp(emit: GraphBuilder, spec: DecoderSpec, layer: int, normed: ir.Value) -> ir.Value:
    """The weighted sum of both experts' outputs, [batch, length, hidden]; only experts with tokens are computed."""
    import onnx_ir as ir

    assert spec.experts is not None
    base = f"/model/layers.{layer}/moe"
    # in float32 whatever the graph computes in: rounding a score may choose another expert
    wide = emit.cast(f"{base}/router", normed, emit.float, ir.DataType.FLOAT)
    scores = emit.linear(f"{base}/router", wide, f"layers.{layer}.router.weight")
    weights = sparse_mixer(emit, spec.experts, f"{base}/mixer", scores)
    if emit.stack(f"layers.{layer}.experts.down.weight").format is None:
        return _float_experts(emit, layer, base, normed, weights)
    return _block_experts(emit, layer, base, normed, weights)


def sparse_mixer(emit: GraphBuilder, experts: Experts, base: str, scores: ir.Value) -> ir.Value:
    """[batch, length, experts] scores to weights: two of each token above 0, all others 0."""
    lowest = emit.op("Constant", f"{base}/lowest/Constant", [], {"value_float": -math.inf})
    zero = emit.op("Constant", f"{base}/zero/Constant", [], {"value_float": 0.0})
    reach = emit.op("Constant", f"{base}/reach/Constant", [], {"value_float": 2 * experts.jitter})
    numbers = emit.int64("expert_numbers", list(range(experts.count)))
    size = emit.op("Abs", f"{base}/Abs", [scores])

    def pick(name: str, candidates: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Which expert is the best of the candidates (bool), and its weight, 0 elsewhere."""
        best = emit.op("ReduceMax", f"{name}/ReduceMax", [candidates, emit.int64("expert_axis", [-1])])
        index = emit.op("ArgMax", f"{name}/ArgMax", [candidates], {"axis": -1})
        chosen = emit.op("Equal", f"{name}/Equal", [index, numbers])
        below = emit.op("Sub", f"{name}/Sub", [best, scores])
        gap = emit.op("Div", f"{name}/Div", [below, emit.op("Max", f"{name}/Max", [size, best])])
        far = emit.op("Greater", f"{name}/Greater", [gap, reach])
        close = emit.op("Where", f"{name}/close/Where", [far, lowest, candidates])
        share = emit.op("Softmax", f"{name}/Softmax", [close], {"axis": -1})
        return chosen, emit.op("Where", f"{name}/Where", [chosen, share, zero])

    first, first_weight = pick(f"{base}/first", scores)
    left = emit.op("Where", f"{base}/left/Where", [first, lowest, scores])
    _, second_weight = pick(f"{base}/second", left)
    return emit.op("Add", f"{base}/Add", [first_weight, second_weight])


def _block_experts(emit: GraphBuilder, layer: int, base: str, normed: ir.Value, weights: ir.Value) -> ir.Value:
    """QMoE: one row of weights a token says both which experts to compute and what to multiply them by.

    On a layer of Phi-3.5-MoE's size it decodes 3.6 times as fast as an If for each expert around MatMulNBits.
    """
    up, down = (emit.stack(f"layers.{layer}.experts.{name}.weight") for name in ("gate_up", "down"))
    assert up.format is not None
    rows = _rows(emit, base, weights)
    zero_points = [emit.stored(m.zero_points) if m.zero_points is not None else None for m in (up, down)]
    first = [emit.stored(up.codes), emit.scales(up), None]
    second = [emit.stored(down.codes), emit.scales(down), None]
    inputs = [normed, rows, *first, *second, None, None, None, *zero_points, None, rows]
    attributes = {
        **_SWIGLU,
        "normalize_routing_weights": 0,
        "expert_weight_bits": up.format.bits,
        "block_size": up.format.block_size,
        "accuracy_level": emit.accuracy_level,
    }
    return emit.op("QMoE", f"{base}/QMoE", inputs, attributes, MS)


def _float_experts(emit: GraphBuilder, layer: int, base: str, normed: ir.Value, weights: ir.Value) -> ir.Value:
    """MoE takes no weights, only scores whose softmax over the best two it computes: the weights' logarithms.

    That makes them sum to 1, and the output is multiplied by what they summed to before.
    """
    up, down = (emit.stack(f"layers.{layer}.experts.{name}.weight") for name in ("gate_up", "down"))
    total = emit.op("ReduceSum", f"{base}/ReduceSum", [weights, emit.int64("expert_axis", [-1])])
    logarithms = _narrow(emit, f"{base}/Log", emit.op("Log", f"{base}/Log", [weights]))
    inputs = [normed, _rows(emit, base, logarithms), emit.stored(up.codes), None, emit.stored(down.codes)]
    mixed = emit.op("MoE", f"{base}/MoE", inputs, {**_SWIGLU, "normalize_routing_weights": 1}, MS)
    return emit.op("Mul", f"{base}/Mul", [mixed, _narrow(emit, f"{base}/ReduceSum", total)])


def _rows(emit: GraphBuilder, base: str, values: ir.Value) -> ir.Value:
    """[batch, length, experts] to [tokens, experts]."""
    return emit.op("Flatten", f"{base}/Flatten", [values], {"axis": -1})


def _narrow(emit: GraphBuilder, name: str, value: ir.Value) -> ir.Value:
    """float32 to the graph's float type."""
    import onnx_ir as ir

    return emit.cast(name, value, ir.DataType.FLOAT, emit.float)
