"""What a report about a graph needs to know of it: which node reads which weights, and which only counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgephi.runtime.placement.graph_parts import (
    INPUT,
    METADATA,
    NODE,
    TENSOR,
    Node,
    graph_parts,
    integer_in,
    messages_in,
    read_node,
    read_tensor,
    text_in,
)

ROW_NUMBERS = 9
"""Place of `position_ids` among GroupQueryAttention's inputs (microsoft/onnxruntime, docs/ContribOperators.md)."""
_COMPARES = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Not"})
_FROM_SHAPES = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
_WHOLE = frozenset({6, 7, 9})
"""TensorProto's INT32, INT64 and BOOL."""


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


@dataclass(frozen=True)
class CompiledFacts:
    """A graph that runs a compiled binary."""

    operators: tuple[str, ...]
    binaries: tuple[str, ...]
    """What its nodes name in `ep_cache_context`."""
    metadata: Mapping[str, str]


def read_graph(path: Path) -> GraphFacts:
    """Read a graph; its weights are not touched.

    Raises:
        ValueError: the file is no graph.
        OSError: it cannot be read.
    """
    nodes: list[Node] = []
    places: dict[str, tuple[int, int]] = {}
    integers: set[str] = set()
    constants: set[str] = set()
    for number, part in graph_parts(path.read_bytes()):
        if number == NODE:
            nodes.append(read_node(part))
        elif number == TENSOR:
            tensor = read_tensor(part)
            constants.add(tensor.name)
            if tensor.dtype in _WHOLE:
                integers.add(tensor.name)
            if tensor.place is not None:
                places[tensor.name] = tensor.place
        elif number == INPUT and _elements(part) in _WHOLE:
            integers.add(text_in(part, 1))
    weights, counting, row_numbers = {}, set(), False
    for node in nodes:
        read = [places[name] for name in node.inputs if name in places]
        if read and (node.operator == "Cast" or (node.operator == "Mul" and set(node.inputs) <= constants)):
            places[node.outputs[0]] = read[0]
            constants.add(node.outputs[0])
        elif read:
            weights[node.name] = frozenset(read)
        row_numbers |= node.operator == "GroupQueryAttention" and any(node.inputs[ROW_NUMBERS : ROW_NUMBERS + 1])
        from_integers = bool(node.inputs) and all(name in integers for name in node.inputs if name)
        if node.operator in _FROM_SHAPES or (from_integers and _keeps_integers(node)):
            counting.add(node.name)
            integers.update(node.outputs)
        elif node.operator in _COMPARES or (node.operator == "Cast" and _keeps_integers(node)):
            integers.update(node.outputs)
    return GraphFacts(weights, frozenset(counting), row_numbers)


def read_compiled(path: Path) -> CompiledFacts:
    """Read the graph around a compiled binary.

    Raises:
        ValueError: the file is no graph.
        OSError: it cannot be read.
    """
    model = path.read_bytes()
    nodes = [read_node(part) for number, part in graph_parts(model) if number == NODE]
    contexts = (node.text("ep_cache_context") for node in nodes)
    return CompiledFacts(
        tuple(node.operator for node in nodes),
        tuple(context for context in contexts if context is not None),
        {text_in(pair, 1): text_in(pair, 2) for number, pair in messages_in(model) if number == METADATA},
    )


def _elements(data: memoryview) -> int:
    """The type of a graph input's elements."""
    for number, kind in messages_in(data):
        if number == 2:
            for at, tensor in messages_in(kind):
                if at == 1:
                    return integer_in(tensor, 1)
    return 0


def _keeps_integers(node: Node) -> bool:
    """Whether integers stay integers; a cast may make them floats."""
    if node.operator != "Cast":
        return node.operator != "ConstantOfShape"
    return node.integer("to") in _WHOLE
