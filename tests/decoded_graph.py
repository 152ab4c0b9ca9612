"""What a graph's blocks decode to, by NumPy and the operators' documentation alone: nothing of edgephi takes part.

MatMulNBits, GatherBlockQuantized, QMoE: docs/ContribOperators.md in onnxruntime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def decoded_weights(graph: Path) -> dict[str, Floats]:
    """Float64 [outputs, inputs] (experts: [experts, outputs, inputs]) by the name of the initializer of the codes."""
    model = onnx.load(str(graph))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        inputs = [constants.get(name) for name in node.input]
        if node.op_type == "Cast" and inputs[0] is not None:
            constants[node.output[0]] = inputs[0].astype(onnx.helper.tensor_dtype_to_np_dtype(attributes["to"]))
        elif node.op_type == "Mul" and all(one is not None for one in inputs):
            constants[node.output[0]] = inputs[0] * inputs[1]
        elif node.op_type == "MatMulNBits":
            zeros = inputs[3] if len(inputs) > 3 else None
            found[node.input[1]] = _decode(inputs[1], inputs[2], zeros, attributes["bits"])[:, : attributes["K"]]
        elif node.op_type == "GatherBlockQuantized":
            found[node.input[0]] = _decode(inputs[0], inputs[2], None, attributes["bits"])
        elif node.op_type == "QMoE":
            for codes, scales, zeros in ((2, 3, 11), (5, 6, 12)):
                offsets = inputs[zeros] if len(inputs) > zeros else None
                found[node.input[codes]] = _decode(
                    inputs[codes], inputs[scales], offsets, attributes["expert_weight_bits"]
                )
    return found


def _decode(
    codes: NDArray[np.uint8], scales: NDArray[np.generic], zeros: NDArray[np.uint8] | None, bits: int
) -> Floats:
    rows = scales.shape[:-1]
    values = _unpacked(codes.reshape(*rows, -1), bits).reshape(*scales.shape, -1).astype(np.float64)
    offsets = (
        2 ** (bits - 1) if zeros is None else _unpacked(zeros.reshape(*rows, -1), bits)[..., : scales.shape[-1], None]
    )
    return ((values - offsets) * scales.astype(np.float64)[..., None]).reshape(*rows, -1)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    if bits == 8:
        return packed.astype(np.int64)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.int64)
