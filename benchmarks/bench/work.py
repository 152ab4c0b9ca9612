"""What a graph has to move and to multiply: bytes of a decode step, integer operations of a prompt.

Read from the graph alone; its data file is not opened. What a runtime adds of its own (packed forms, copies, rows it
computes and throws away) is not counted: a share of the machine is of the work that has to be done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgephi.errors import BundleError

if TYPE_CHECKING:
    import onnx

ROW_INPUTS = {
    "Gather": frozenset({0}),
    "GatherBlockQuantized": frozenset({0, 2, 3}),
    "GroupQueryAttention": frozenset({7, 8}),
}
"""Inputs of which one token reads one row: tables of embeddings with their scales, cosines and sines. By position, as
onnxruntime's ContribOperators.md lists them."""


@dataclass(frozen=True)
class Cache:
    """One layer's keys or values."""

    bytes_per_token: int
    window: int | None
    """Tokens a query looks back at most; None: all."""


@dataclass(frozen=True)
class Work:
    """Of one graph, one sequence."""

    weight_bytes: int
    """A decode step reads: every weight once, in the type the operator takes it (a cast behind it is folded at load);
    of embeddings, cosines and sines one row; of experts as many as a token is sent to."""
    caches: tuple[Cache, ...]
    token_operations: int
    """Integer operations of one token: 2·K·N of every MatMulNBits with accuracy_level 4 (a multiplication and an
    addition each), the head apart. Others compute in floats."""
    head_operations: int
    """The head's, for one row."""

    def step_bytes(self, lengths: Iterable[int]) -> float:
        """Mean bytes of decode steps after which the sequence has these lengths: weights + keys and values of all
        positions that are attended, the new one included."""
        reached = np.fromiter(lengths, dtype=np.int64)
        caches = sum(
            one.bytes_per_token * np.minimum(reached, one.window or np.iinfo(np.int64).max).mean()
            for one in self.caches
        )
        return float(self.weight_bytes + caches)

    def prompt_operations(self, tokens: int) -> int:
        """Integer operations of a prompt: 2·M·N·K of all linear layers with M = tokens, and the head with M = 1."""
        return tokens * self.token_operations + self.head_operations


def graph_work(path: Path) -> Work:
    """Read a decoder's graph.

    Raises:
        BundleError: the file is no graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise BundleError(f"the graph cannot be read: {error}", where=path, remedy="Export the model again") from error
    constants = {tensor.name: (tuple(tensor.dims), _bits(tensor.data_type)) for tensor in graph.initializer}
    read: dict[str, int] = {}
    operations = {}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in constants:
            constants[node.output[0]] = (constants[node.input[0]][0], _bits(_attribute(node, "to", 1)))
            continue
        if node.op_type == "Mul" and all(name in constants for name in node.input):  # scales and their power of two
            constants[node.output[0]] = constants[node.input[0]]
            continue
        for place, name in enumerate(node.input):
            if name in constants:
                dims, bits = constants[name]
                stored = -(-prod(dims) * bits // 8)
                read[name] = max(read.get(name, 0), round(stored * _touched(node, place, dims)))
        if node.op_type == "MatMulNBits" and _attribute(node, "accuracy_level", 0) == 4:
            operations[node.output[0]] = 2 * _attribute(node, "K", 0) * _attribute(node, "N", 0)
    head = _head(graph, set(operations))
    return Work(
        weight_bytes=sum(read.values()),
        caches=_caches(graph),
        token_operations=sum(count for output, count in operations.items() if output != head),
        head_operations=operations.get(head, 0) if head else 0,
    )


def _touched(node: onnx.NodeProto, place: int, dims: tuple[int, ...]) -> float:
    """Share of a constant that one token makes a node read."""
    if not dims or not dims[0]:
        return 1.0
    along = (
        _attribute(node, "gather_axis", 0) if node.op_type == "GatherBlockQuantized" else _attribute(node, "axis", 0)
    )
    if place in ROW_INPUTS.get(node.op_type, ()) and along == 0:
        return 1 / dims[0]
    if node.op_type == "QMoE" and place >= 2:
        return min(1.0, _attribute(node, "k", 1) / dims[0])
    return 1.0


def _caches(graph: onnx.GraphProto) -> tuple[Cache, ...]:
    windows = {
        name: window
        for node in graph.node
        if node.op_type == "GroupQueryAttention" and (window := _attribute(node, "local_window_size", -1)) > 0
        for name in node.input[3:5]
    }
    found = []
    for port in graph.input:
        shape = port.type.tensor_type.shape.dim
        if port.name.startswith("past_key_values.") and len(shape) == 4:
            size = shape[1].dim_value * shape[3].dim_value * _bits(port.type.tensor_type.elem_type) // 8
            found.append(Cache(size, windows.get(port.name)))
    return tuple(found)


def _head(graph: onnx.GraphProto, products: set[str]) -> str | None:
    """The output of the product that gives the logits, casts and the like between them passed over."""
    makers = {output: node for node in graph.node for output in node.output if output}
    name = graph.output[0].name if graph.output else ""
    while name in makers and name not in products:
        name = makers[name].input[0] if makers[name].input else ""
    return name if name in products else None


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _bits(kind: int) -> int:
    import onnx

    if kind in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4):
        return 4
    return 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
