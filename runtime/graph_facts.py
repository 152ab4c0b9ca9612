"""What a report about a graph needs to know of it: which node reads which weights, and which only counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

ROW_NUMBERS = 9
"""Place of `position_ids` among GroupQueryAttention's inputs (microsoft/onnxruntime, docs/ContribOperators.md)."""
_COMPARES = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Not"})
_FROM_SHAPES = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})


@dataclass(frozen=True)
class GraphFacts:
    """By node name; nodes that onnxruntime makes while it loads are not in here."""

    weights: Mapping[str, frozenset[tuple[int, int]]]
    """(offset, length) in the data file of every weight a node reads, also through what is folded at load: a cast, and
    the product of scales with a power of two."""
    integer_nodes: frozenset[str]
    """Nodes whose inputs and outputs are integers or truth values, and those that read a shape."""
    row_numbers: bool
    """Attention is told each token's row in the rotary tables."""


def read_graph(path: Path) -> GraphFacts:
    """Read a graph; its weights are not touched.

    Raises:
        onnx's and protobuf's exceptions, where the file is no graph.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    places = {tensor.name: _place(tensor) for tensor in graph.initializer if tensor.external_data}
    integers = {tensor.name for tensor in graph.initializer if _whole(tensor.data_type)}
    integers |= {port.name for port in graph.input if _whole(port.type.tensor_type.elem_type)}
    constants = {tensor.name for tensor in graph.initializer}
    weights, counting, row_numbers = {}, set(), False
    for node in graph.node:
        read = [places[name] for name in node.input if name in places]
        if read and (node.op_type == "Cast" or (node.op_type == "Mul" and set(node.input) <= constants)):
            places[node.output[0]] = read[0]
            constants.add(node.output[0])
        elif read:
            weights[node.name] = frozenset(read)
        row_numbers |= node.op_type == "GroupQueryAttention" and any(node.input[ROW_NUMBERS : ROW_NUMBERS + 1])
        from_integers = bool(node.input) and all(name in integers for name in node.input if name)
        if node.op_type in _FROM_SHAPES or (from_integers and _keeps_integers(node)):
            counting.add(node.name)
            integers.update(node.output)
        elif node.op_type in _COMPARES or (node.op_type == "Cast" and _keeps_integers(node)):
            integers.update(node.output)
    return GraphFacts(weights, frozenset(counting), row_numbers)


def _place(tensor: onnx.TensorProto) -> tuple[int, int]:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    return int(facts.get("offset", "0")), int(facts["length"])


def _keeps_integers(node: onnx.NodeProto) -> bool:
    """Whether integers stay integers; a cast may make them floats."""
    if node.op_type != "Cast":
        return node.op_type != "ConstantOfShape"
    return any(attribute.name == "to" and _whole(attribute.i) for attribute in node.attribute)


def _whole(kind: int) -> bool:
    import onnx

    return kind in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
