"""What a report about a graph needs to know of it: which node reads which weights, and which only counts.

Source of the field numbers: onnx/onnx, onnx/onnx.proto. Read here because a program that runs models needs no onnx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgephi.graph_file import read_fields

ROW_NUMBERS = 9
"""Place of `position_ids` among GroupQueryAttention's inputs (microsoft/onnxruntime, docs/ContribOperators.md)."""
_COMPARES = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Not"})
_FROM_SHAPES = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
_WHOLE = frozenset({6, 7, 9})
"""TensorProto's INT32, INT64 and BOOL."""
_GRAPH, _METADATA = 7, 14
_NODE, _INITIALIZER, _INPUT = 1, 5, 11


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
    nodes: list[_Node] = []
    places: dict[str, tuple[int, int]] = {}
    integers: set[str] = set()
    constants: set[str] = set()
    for number, part in _parts(path):
        if number == _NODE:
            nodes.append(_node(part))
        elif number == _INITIALIZER:
            name, kind, place = _tensor(part)
            constants.add(name)
            if kind in _WHOLE:
                integers.add(name)
            if place is not None:
                places[name] = place
        elif number == _INPUT and _elements(part) in _WHOLE:
            integers.add(_text(part, 1))
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
    nodes = [_node(part) for number, part in _parts(path) if number == _NODE]
    pairs = [part for number, part in _messages(memoryview(path.read_bytes())) if number == _METADATA]
    return CompiledFacts(
        tuple(node.operator for node in nodes),
        tuple(node.context for node in nodes if node.context is not None),
        {_text(pair, 1): _text(pair, 2) for pair in pairs},
    )


@dataclass
class _Node:
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    name: str = ""
    operator: str = ""
    to: int | None = None
    """The attribute of a cast."""
    context: str | None = None


def _parts(path: Path) -> Iterator[tuple[int, memoryview]]:
    """(field number, bytes) of the graph's fields that have a length."""
    for number, graph in _messages(memoryview(path.read_bytes())):
        if number == _GRAPH:
            yield from _messages(graph)


def _node(data: memoryview) -> _Node:
    node = _Node()
    for number, part in _messages(data):
        if number == 1:
            node.inputs.append(_string(part))
        elif number == 2:
            node.outputs.append(_string(part))
        elif number == 3:
            node.name = _string(part)
        elif number == 4:
            node.operator = _string(part)
        elif number == 5:
            name = _text(part, 1)
            if name == "to":
                node.to = _integer(part, 3)
            elif name == "ep_cache_context":
                node.context = _text(part, 4)
    return node


def _tensor(data: memoryview) -> tuple[str, int, tuple[int, int] | None]:
    """Name, type, and offset and length in the data file, where it is there."""
    facts = {_text(part, 1): _text(part, 2) for number, part in _messages(data) if number == 13}
    place = (int(facts.get("offset", "0")), int(facts["length"])) if facts else None
    return _text(data, 8), _integer(data, 2), place


def _elements(data: memoryview) -> int:
    """The type of a graph input's elements."""
    for number, kind in _messages(data):
        if number == 2:
            for at, tensor in _messages(kind):
                if at == 1:
                    return _integer(tensor, 1)
    return 0


def _keeps_integers(node: _Node) -> bool:
    """Whether integers stay integers; a cast may make them floats."""
    if node.operator != "Cast":
        return node.operator != "ConstantOfShape"
    return node.to in _WHOLE


def _messages(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    return ((number, value) for number, value in read_fields(data) if not isinstance(value, int))


def _text(data: memoryview, field_number: int) -> str:
    found = ""
    for number, part in _messages(data):
        if number == field_number:
            found = _string(part)
    return found


def _integer(data: memoryview, field_number: int) -> int:
    found = 0
    for number, value in read_fields(data):
        if number == field_number and isinstance(value, int):
            found = value
    return found


def _string(data: memoryview) -> str:
    return bytes(data).decode("utf-8", "replace")
