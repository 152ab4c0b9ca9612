"""A decoder's graph as nodes and tensors that can be changed and written again.

Only the fields that are needed are read; what stays as it is, stays bytes. Source of the field numbers: onnx/onnx,
onnx/onnx.proto; of the wire format: protobuf.dev, "Encoding". Read here because a program that runs models needs no
onnx.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from edgephi.graph_file import read_fields

FLOAT, UINT8, INT8, INT64, FLOAT16 = 1, 2, 3, 7, 10
DTYPES: dict[int, np.dtype[np.generic]] = {
    FLOAT: np.dtype(np.float32),
    UINT8: np.dtype(np.uint8),
    INT8: np.dtype(np.int8),
    INT64: np.dtype(np.int64),
    FLOAT16: np.dtype(np.float16),
}
"""TensorProto's element types, of those that a bundle's graphs have."""
_NODE, _NAME, _TENSOR, _INPUT, _OUTPUT = 1, 2, 5, 11, 12
_GRAPH = 7


@dataclass
class Node:
    operator: str
    inputs: list[str]
    outputs: list[str]
    name: str = ""
    domain: str = ""
    attributes: list[bytes] = field(default_factory=list)
    """AttributeProto."""

    def integer(self, name: str) -> int | None:
        """The attribute of that name."""
        for attribute in self.attributes:
            if attribute_name(attribute) == name:
                value = dict(read_fields(memoryview(attribute))).get(3, 0)
                return value if isinstance(value, int) else None
        return None


@dataclass
class Tensor:
    """An initializer."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    place: tuple[int, int] | None
    """Offset and bytes in the data file; None: it lies in the graph."""
    stored: bytes
    """TensorProto, as it was."""

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass
class GraphFile:
    nodes: list[Node]
    tensors: dict[str, Tensor]
    inputs: list[bytes]
    """ValueInfoProto."""
    outputs: list[bytes]
    rest: bytes
    """The model's other fields, as they were: versions and opsets."""

    def producer(self) -> dict[str, Node]:
        """Of every value that a node computes."""
        return {output: node for node in self.nodes for output in node.outputs if output}

    def readers(self) -> dict[str, list[Node]]:
        """Of every value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                if name:
                    found.setdefault(name, []).append(node)
        return found

    def output_names(self) -> list[str]:
        return [_string(dict(read_fields(memoryview(value)))[1]) for value in self.outputs]

    def prune(self) -> None:
        """Leave out the nodes and tensors that no output needs. Inputs stay: callers name them."""
        needed, kept = set(self.output_names()), []
        for node in reversed(self.nodes):  # a node stands behind those it reads from
            if needed.intersection(node.outputs):
                needed.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        inputs = {_string(dict(read_fields(memoryview(value)))[1]) for value in self.inputs}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in needed or name in inputs}


def read_model(data: bytes) -> GraphFile:
    """Read a model.

    Raises:
        ValueError: the bytes are no model, or its tensors have a type that no bundle has.
    """
    graph, rest = b"", bytearray()
    for number, value in read_fields(memoryview(data)):
        if number == _GRAPH and isinstance(value, memoryview):
            graph = bytes(value)
        else:
            rest += _field(number, value)
    made = GraphFile([], {}, [], [], bytes(rest))
    for number, value in read_fields(memoryview(graph)):
        if not isinstance(value, memoryview):
            continue
        if number == _NODE:
            made.nodes.append(_read_node(value))
        elif number == _TENSOR:
            tensor = _read_tensor(value)
            made.tensors[tensor.name] = tensor
        elif number == _INPUT:
            made.inputs.append(bytes(value))
        elif number == _OUTPUT:
            made.outputs.append(bytes(value))
    return made


def write_model(model: GraphFile) -> bytes:
    """The model as protobuf."""
    graph = bytearray()
    for node in model.nodes:
        graph += _field(_NODE, _node_bytes(node))
    graph += _field(_NAME, b"main_graph")
    for tensor in model.tensors.values():
        graph += _field(_TENSOR, tensor.stored)
    for number, values in ((_INPUT, model.inputs), (_OUTPUT, model.outputs)):
        for value in values:
            graph += _field(number, value)
    return model.rest + _field(_GRAPH, bytes(graph))


def attribute_name(attribute: bytes) -> str:
    """Of an AttributeProto."""
    return _string(dict(read_fields(memoryview(attribute))).get(1))


def integer_attribute(name: str, value: int) -> bytes:
    """An AttributeProto."""
    return _field(1, name.encode()) + _field(3, value) + _field(20, 2)


def tensor_attribute(name: str, value: Tensor) -> bytes:
    """An AttributeProto."""
    return _field(1, name.encode()) + _field(5, value.stored) + _field(20, 4)


def float_output(name: str, shape: Sequence[int]) -> bytes:
    """A ValueInfoProto."""
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _field(1, FLOAT) + _field(2, dims)))


def small_tensor(name: str, values: NDArray[np.generic]) -> Tensor:
    """A tensor that lies in the graph."""
    dtype = _element_type(values.dtype)
    head = _tensor_head(name, dtype, values.shape)
    return Tensor(name, dtype, values.shape, None, head + _field(9, np.ascontiguousarray(values).tobytes()))


def stored_tensor(name: str, dtype: int, shape: tuple[int, ...], file: str, place: tuple[int, int]) -> Tensor:
    """A tensor that lies in a data file."""
    entries = {"location": file, "offset": str(place[0]), "length": str(place[1])}
    external = b"".join(
        _field(13, _field(1, key.encode()) + _field(2, value.encode())) for key, value in entries.items()
    )
    return Tensor(name, dtype, shape, place, _tensor_head(name, dtype, shape) + external + _field(14, 1))


def tensor_values(tensor: Tensor, data: NDArray[np.uint8]) -> NDArray[np.generic]:
    """What a tensor holds.

    Args:
        data: the bytes of the data file.

    Raises:
        ValueError: it lies outside the file, or is written in another way than in raw bytes.
    """
    dtype = DTYPES[tensor.dtype]
    if tensor.place is not None:
        offset, length = tensor.place
        if length != tensor.bytes or offset + length > len(data):
            raise ValueError(f"the tensor {tensor.name} does not lie in the data file")
        return data[offset : offset + length].view(dtype).reshape(tensor.shape)
    raw = dict(read_fields(memoryview(tensor.stored))).get(9)
    if not isinstance(raw, memoryview) or len(raw) != tensor.bytes:
        raise ValueError(f"the tensor {tensor.name} is not written in raw bytes")
    return np.frombuffer(raw, dtype).reshape(tensor.shape)


def _element_type(dtype: np.dtype[np.generic]) -> int:
    return next(number for number, known in DTYPES.items() if known == dtype)


def _tensor_head(name: str, dtype: int, shape: Iterable[int]) -> bytes:
    return b"".join(_field(1, size) for size in shape) + _field(2, dtype) + _field(8, name.encode())


def _read_node(data: memoryview) -> Node:
    node = Node("", [], [])
    for number, value in read_fields(data):
        if number == 1:
            node.inputs.append(_string(value))
        elif number == 2:
            node.outputs.append(_string(value))
        elif number == 3:
            node.name = _string(value)
        elif number == 4:
            node.operator = _string(value)
        elif number == 5 and isinstance(value, memoryview):
            node.attributes.append(bytes(value))
        elif number == 7:
            node.domain = _string(value)
    return node


def _node_bytes(node: Node) -> bytes:
    parts = [_field(1, name.encode()) for name in node.inputs]
    parts += [_field(2, name.encode()) for name in node.outputs]
    parts += [_field(3, node.name.encode()), _field(4, node.operator.encode())]
    parts += [_field(5, attribute) for attribute in node.attributes]
    parts += [_field(7, node.domain.encode())] if node.domain else []
    return b"".join(parts)


def _read_tensor(data: memoryview) -> Tensor:
    name, dtype, shape, external = "", 0, list[int](), dict[str, str]()
    for number, value in read_fields(data):
        if number == 1:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8:
            name = _string(value)
        elif number == 13 and isinstance(value, memoryview):
            entry = dict(read_fields(value))
            external[_string(entry.get(1))] = _string(entry.get(2))
    if dtype not in DTYPES:
        raise ValueError(f"the tensor {name} has elements of type {dtype}")
    place = (int(external.get("offset", "0")), int(external["length"])) if "length" in external else None
    return Tensor(name, dtype, tuple(shape), place, bytes(data))


def _packed(data: memoryview) -> list[int]:

    numbers, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    return numbers


def _field(number: int, value: int | bytes | memoryview) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + bytes(value)


def _varint(value: int) -> bytes:
    if value < 0:
        value += 1 << 64
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def _string(value: int | memoryview | None) -> str:
    return bytes(value).decode("utf-8", "replace") if isinstance(value, memoryview) else ""
