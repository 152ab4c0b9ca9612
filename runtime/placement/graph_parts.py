"""Nodes and tensors of an ONNX graph, read from its bytes, because a program that runs models needs no onnx.

Source of the field numbers: onnx/onnx, onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from edgephi.graph_file import read_fields, read_varints

GRAPH, METADATA = 7, 14
"""Fields of a ModelProto."""
NODE, NAME, TENSOR, INPUT, OUTPUT = 1, 2, 5, 11, 12
"""Fields of a GraphProto."""
MOST_DIMENSIONS = 64
"""Of a tensor: a few bytes must not become a list of millions."""

Message = bytes | memoryview


@dataclass
class Node:
    operator: str
    inputs: list[str]
    outputs: list[str]
    name: str = ""
    domain: str = ""
    attributes: list[Message] = field(default_factory=list)
    """AttributeProto; of several with one name the last counts."""

    def integer(self, name: str) -> int | None:
        """The attribute of that name."""
        found = self._attribute(name)
        return None if found is None else integer_in(found, 3)

    def text(self, name: str) -> str | None:
        """The attribute of that name."""
        found = self._attribute(name)
        return None if found is None else text_in(found, 4)

    def _attribute(self, name: str) -> Message | None:
        return next((one for one in reversed(self.attributes) if attribute_name(one) == name), None)


@dataclass
class Tensor:
    """An initializer."""

    name: str
    dtype: int
    """TensorProto's number of the type."""
    shape: tuple[int, ...]
    place: tuple[int, int] | None
    """Offset and bytes in the data file; None: it lies in the graph."""
    stored: Message
    """TensorProto, as it was."""


def graph_parts(model: Message) -> Iterator[tuple[int, memoryview]]:
    """(field number, bytes) of the fields of a model's graph that have a length.

    Raises:
        ValueError: the bytes are no model.
    """
    for number, graph in messages_in(model):
        if number == GRAPH:
            yield from messages_in(graph)


def read_node(data: memoryview) -> Node:
    """Read a NodeProto.

    Raises:
        ValueError: the bytes are no node.
    """
    node = Node("", [], [])
    for number, part in messages_in(data):
        if number == 1:
            node.inputs.append(_string(part))
        elif number == 2:
            node.outputs.append(_string(part))
        elif number == 3:
            node.name = _string(part)
        elif number == 4:
            node.operator = _string(part)
        elif number == 5:
            node.attributes.append(part)
        elif number == 7:
            node.domain = _string(part)
    return node


def read_tensor(data: memoryview) -> Tensor:
    """Read a TensorProto.

    Raises:
        ValueError: the bytes are no tensor, or do not say where in the data file it lies.
    """
    name, dtype, shape, external = "", 0, list[int](), dict[str, str]()
    for number, value in read_fields(data):
        if number == 1:
            for size in (value,) if isinstance(value, int) else read_varints(value):
                if len(shape) == MOST_DIMENSIONS:
                    raise ValueError("a tensor has more dimensions than any model needs")
                shape.append(size)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8 and isinstance(value, memoryview):
            name = _string(value)
        elif number == 13 and isinstance(value, memoryview):
            external[text_in(value, 1)] = text_in(value, 2)
    place = None
    if external:
        place = (int(external.get("offset", "0")), int(external.get("length", "-1")))
        if min(place) < 0:
            raise ValueError(f"the tensor {name} has no place in the data file")
    return Tensor(name, dtype, tuple(shape), place, data)


def attribute_name(attribute: Message) -> str:
    """Of an AttributeProto."""
    return text_in(attribute, 1)


def messages_in(data: Message) -> Iterator[tuple[int, memoryview]]:
    """(field number, bytes) of a message's fields that have a length."""
    return ((number, value) for number, value in read_fields(memoryview(data)) if not isinstance(value, int))


def text_in(data: Message, field_number: int) -> str:
    """A message's field of that number; the last one counts, as in protobuf."""
    found = ""
    for number, part in messages_in(data):
        if number == field_number:
            found = _string(part)
    return found


def integer_in(data: Message, field_number: int) -> int:
    """A message's field of that number; the last one counts, as in protobuf."""
    found = 0
    for number, value in read_fields(memoryview(data)):
        if number == field_number and isinstance(value, int):
            found = value
    return found


def _string(data: memoryview) -> str:
    return bytes(data).decode("utf-8", "replace")
