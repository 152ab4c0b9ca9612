"""A decoder's graph as nodes and tensors that can be changed and written again.

What stays as it is, stays bytes. Source of the field numbers: onnx/onnx, onnx/onnx.proto; of the wire format:
protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from edgephi.graph_file import read_fields
from edgephi.runtime.placement.graph_parts import (
    GRAPH,
    INPUT,
    NAME,
    NODE,
    OUTPUT,
    TENSOR,
    Message,
    Node,
    Tensor,
    graph_parts,
    read_node,
    read_tensor,
    text_in,
)

FLOAT, UINT8, INT8, INT64, FLOAT16 = 1, 2, 3, 7, 10
DTYPES: dict[int, np.dtype[np.generic]] = {
    FLOAT: np.dtype(np.float32),
    UINT8: np.dtype(np.uint8),
    INT8: np.dtype(np.int8),
    INT64: np.dtype(np.int64),
    FLOAT16: np.dtype(np.float16),
}
"""TensorProto's element types, of those that a bundle's graphs have."""


@dataclass
class GraphFile:
    nodes: list[Node]
    tensors: dict[str, Tensor]
    inputs: list[Message]
    """ValueInfoProto."""
    outputs: list[Message]
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
        return [_value_name(value) for value in self.outputs]

    def prune(self) -> None:
        """Leave out the nodes and tensors that no output needs. Inputs stay: callers name them."""
        needed, kept = set(self.output_names()), []
        for node in reversed(self.nodes):  # a node stands behind those it reads from
            if needed.intersection(node.outputs):
                needed.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        inputs = {_value_name(value) for value in self.inputs}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in needed or name in inputs}


def read_model(data: bytes) -> GraphFile:
    """Read a model.

    Raises:
        ValueError: the bytes are no model, or its tensors have a type that no bundle has.
    """
    rest = b"".join(_field(number, value) for number, value in read_fields(memoryview(data)) if number != GRAPH)
    made = GraphFile([], {}, [], [], rest)
    for number, part in graph_parts(data):
        if number == NODE:
            made.nodes.append(read_node(part))
        elif number == TENSOR:
            tensor = read_tensor(part)
            if tensor.dtype not in DTYPES:
                raise ValueError(f"the tensor {tensor.name} has elements of type {tensor.dtype}")
            made.tensors[tensor.name] = tensor
        elif number == INPUT:
            made.inputs.append(part)
        elif number == OUTPUT:
            made.outputs.append(part)
    return made


def write_model(model: GraphFile) -> bytes:
    """The model as protobuf."""
    graph = bytearray()
    for node in model.nodes:
        graph += _field(NODE, _node_bytes(node))
    graph += _field(NAME, b"main_graph")
    for tensor in model.tensors.values():
        graph += _field(TENSOR, tensor.stored)
    for number, values in ((INPUT, model.inputs), (OUTPUT, model.outputs)):
        for value in values:
            graph += _field(number, value)
    return model.rest + _field(GRAPH, bytes(graph))


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
    size = prod(tensor.shape) * dtype.itemsize
    if tensor.place is not None:
        offset, length = tensor.place
        if length != size or offset + length > len(data):
            raise ValueError(f"the tensor {tensor.name} does not lie in the data file")
        return data[offset : offset + length].view(dtype).reshape(tensor.shape)
    raw = dict(read_fields(memoryview(tensor.stored))).get(9)
    if not isinstance(raw, memoryview) or len(raw) != size:
        raise ValueError(f"the tensor {tensor.name} is not written in raw bytes")
    return np.frombuffer(raw, dtype).reshape(tensor.shape)


def _value_name(value: Message) -> str:
    name = text_in(value, 1)
    if not name:
        raise ValueError("an input or output of the graph has no name")
    return name


def _element_type(dtype: np.dtype[np.generic]) -> int:
    return next(number for number, known in DTYPES.items() if known == dtype)


def _tensor_head(name: str, dtype: int, shape: Iterable[int]) -> bytes:
    return b"".join(_field(1, size) for size in shape) + _field(2, dtype) + _field(8, name.encode())


def _node_bytes(node: Node) -> bytes:
    parts = [_field(1, name.encode()) for name in node.inputs]
    parts += [_field(2, name.encode()) for name in node.outputs]
    parts += [_field(3, node.name.encode()), _field(4, node.operator.encode())]
    parts += [_field(5, attribute) for attribute in node.attributes]
    parts += [_field(7, node.domain.encode())] if node.domain else []
    return b"".join(parts)


def _field(number: int, value: int | Message) -> bytes:
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
