"""A traced float32 graph gets edgephi's weights.

MatMul and Gemm with a constant matrix become com.microsoft.MatMulNBits, the lookup of tokens GatherBlockQuantized; all
other nodes stay as they were traced. First the graph is rewritten, which decides the place of every weight; then the
weights flow, one at a time, from the traced graph's data into the bundle's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from edgephi.export.graph.builder import DATA_FILE, MS
from edgephi.export.spec import Weight
from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.layout import Allocator, StoredMatrix, StoredTensor, place_matrix
from edgephi.export.weights.recipe import Recipe, block_format
from edgephi.quantize.round_to_nearest import round_to_nearest

if TYPE_CHECKING:
    import onnx_ir as ir

VALUES_PER_SLICE = 2 * 2**20
_SAME_NUMBERS = ("Reshape", "Identity", "Cast")
"""What some models do to token ids before the lookup."""

INLINE_BYTES = 1024
"""Tensors below this stay in the graph file: axes, shapes, scalars."""


@dataclass(frozen=True)
class TracedMatrix:
    """A constant matrix the model multiplies by or looks tokens up in, as [rows = outputs, columns = inputs]."""

    source: ir.TensorProtocol
    turned: bool
    """The source is [columns, rows]."""
    role: Literal["linear", "embedding", "head"]
    stored: StoredMatrix


@dataclass(frozen=True)
class TracedTensor:
    """Any other constant, stored byte for byte."""

    source: ir.TensorProtocol
    stored: StoredTensor


@dataclass(frozen=True)
class TracedWeights:
    """What belongs into the data file."""

    matrices: tuple[TracedMatrix, ...]
    tensors: tuple[TracedTensor, ...]
    tied_embedding: bool
    bytes: int

    @property
    def source_bytes(self) -> int:
        return sum(m.source.nbytes for m in self.matrices) + sum(t.source.nbytes for t in self.tensors)


def rewrite(model: ir.Model, recipe: Recipe) -> TracedWeights:
    """Rewrite the model's graph in place; its weights become references into the bundle's data file.

    A float32 recipe leaves every node as it is.

    Raises:
        UsageError: the rows of the embedding do not divide into blocks.
    """
    import onnx_ir.passes.common as passes

    if model.functions:
        passes.InlinePass()(model)  # bundles have no functions of their own
    # traced constants can be nodes, even of a branch, with their bytes in the traced graph's data
    passes.LiftConstantsToInitializersPass(size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    rewriter = _Rewriter(model.graph, recipe)
    if recipe.linear is not None:
        rewriter.quantize()
        model.opset_imports[MS] = 1
        # the transposes of weights, and weights that only quantized nodes used
        passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    return rewriter.place_rest()


@dataclass(frozen=True)
class _Operand:
    """A constant float matrix where a node takes it, seen as [rows = outputs, columns = inputs]."""

    initializer: ir.Value
    turned: bool

    @property
    def shape(self) -> tuple[int, int]:
        assert self.initializer.const_value is not None
        rows, columns = self.initializer.const_value.shape.numpy()
        return (columns, rows) if self.turned else (rows, columns)


class _Rewriter:
    def __init__(self, graph: ir.Graph, recipe: Recipe) -> None:
        self._graph, self._recipe = graph, recipe
        self._allocator = Allocator()
        self._matrices: dict[tuple[str, bool], TracedMatrix] = {}
        self._linears = {node: operand for node in graph if (operand := _weight_of(node)) is not None}
        self._lookups = {node: operand for node in graph if (operand := _token_table_of(node)) is not None}
        self._head = _head(graph, self._linears)
        self._tied = self._head is not None and self._linears[self._head] in self._lookups.values()

    def quantize(self) -> None:
        """Replace linear layers and the token lookup."""
        for node, operand in self._lookups.items():
            self._replace_lookup(node, self._matrix(operand, "embedding"))
        for node, operand in self._linears.items():
            self._replace_linear(node, self._matrix(operand, "head" if node is self._head else "linear"))

    def place_rest(self) -> TracedWeights:
        """Give every constant that is not quantized a place, or keep it in the graph when it is small."""
        import onnx_ir as ir

        tensors = []
        ours = {tensor.name for matrix in self._matrices.values() for tensor in _views(matrix.stored)}
        for name, value in self._graph.initializers.items():
            source = value.const_value
            if name in ours or source is None:
                continue
            if source.nbytes < INLINE_BYTES:
                value.const_value = ir.Tensor(source.numpy().copy(), dtype=source.dtype, name=name)
                _unmap(source)
                continue
            place = self._allocator.place(name, (source.nbytes,), "uint8")
            tensors.append(TracedTensor(source, place))
            shape = ir.Shape(source.shape.numpy())
            value.const_value = ir.ExternalTensor(
                DATA_FILE, place.offset, place.bytes, source.dtype, shape=shape, name=name
            )
        return TracedWeights(tuple(self._matrices.values()), tuple(tensors), self._tied, self._allocator.end)

    def _matrix(self, operand: _Operand, role: Literal["linear", "embedding", "head"]) -> TracedMatrix:
        name = operand.initializer.name
        assert name is not None and operand.initializer.const_value is not None
        key = (name, operand.turned)
        if key not in self._matrices:
            weight = Weight(f"{name}.T" if operand.turned else name, (), operand.shape, role)
            fmt = block_format(self._recipe, weight)
            stored = place_matrix(self._allocator, weight.name, weight, fmt, replace(self._recipe, half_scales=False))
            self._matrices[key] = TracedMatrix(operand.initializer.const_value, operand.turned, role, stored)
        return self._matrices[key]

    def _replace_linear(self, node: ir.Node, matrix: TracedMatrix) -> None:
        import onnx_ir as ir

        fmt = matrix.stored.format
        assert fmt is not None
        inputs = [node.inputs[0], *(self._initializer(tensor) for tensor in matrix.stored.tensors)]
        attributes = {
            "K": matrix.stored.columns,
            "N": matrix.stored.rows,
            "bits": fmt.bits,
            "block_size": fmt.block_size,
            "accuracy_level": self._recipe.accuracy_level,
        }
        nodes = [self._node("MatMulNBits", f"{node.name}/MatMulNBits", inputs, attributes)]
        addend = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        if addend is not None:
            nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], addend], name=f"{node.name}/Add"))
        self._swap(node, nodes)

    def _replace_lookup(self, node: ir.Node, matrix: TracedMatrix) -> None:
        stored = matrix.stored
        assert stored.format is not None and stored.scales is not None
        inputs = [self._initializer(_rows_view(stored)), node.inputs[1], self._initializer(stored.scales)]
        attributes = {"bits": 8, "block_size": stored.format.block_size, "gather_axis": 0, "quantize_axis": 1}
        self._swap(node, [self._node("GatherBlockQuantized", f"{node.name}/GatherBlockQuantized", inputs, attributes)])

    def _node(self, op: str, name: str, inputs: list[ir.Value | None], attributes: dict[str, int]) -> ir.Node:
        import onnx_ir as ir

        return ir.Node(MS, op, inputs, [ir.AttrInt64(key, value) for key, value in attributes.items()], name=name)

    def _swap(self, old: ir.Node, new: list[ir.Node]) -> None:
        from onnx_ir.convenience import replace_nodes_and_values

        replace_nodes_and_values(self._graph, old, [old], new, old.outputs, new[-1].outputs)

    def _initializer(self, tensor: StoredTensor) -> ir.Value:
        import onnx_ir as ir

        if tensor.name not in self._graph.initializers:
            dtype = ir.DataType.UINT8 if tensor.dtype == "uint8" else ir.DataType.FLOAT
            shape = ir.Shape(tensor.shape)
            data = ir.ExternalTensor(DATA_FILE, tensor.offset, tensor.bytes, dtype, shape=shape, name=tensor.name)
            value = ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=shape, const_value=data)
            self._graph.register_initializer(value)
        return self._graph.initializers[tensor.name]


def _rows_view(stored: StoredMatrix) -> StoredTensor:
    """Codes as the lookup takes them, [rows, columns]; MatMulNBits takes the same bytes as [rows, blocks, block]."""
    return StoredTensor(f"{stored.codes.name}_rows", stored.codes.offset, (stored.rows, stored.columns), "uint8")


def _views(stored: StoredMatrix) -> tuple[StoredTensor, ...]:
    return (*stored.tensors, _rows_view(stored))


def _weight_of(node: ir.Node) -> _Operand | None:
    """The weight of a linear layer; None for any other node."""
    if node.domain or node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
        return None
    outputs_first = False
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0) or any(
            node.attributes.get_float(x, 1.0) != 1 for x in ("alpha", "beta")
        ):
            return None
        outputs_first = bool(node.attributes.get_int("transB", 0))
    return _constant_matrix(node.inputs[1], outputs_first)


def _constant_matrix(value: ir.Value, outputs_first: bool) -> _Operand | None:
    """Follow an operand through Identity and Transpose to a float32 matrix."""
    import onnx_ir as ir

    source: ir.Value | None = value
    while source is not None and (node := source.producer()) is not None:
        if node.domain or node.op_type not in ("Identity", "Transpose"):
            return None
        outputs_first ^= node.op_type == "Transpose"
        source = node.inputs[0]
    # a transpose of a matrix is always perm [1, 0]
    if source is None or source.const_value is None or not source.is_initializer():
        return None
    if source.const_value.dtype != ir.DataType.FLOAT or len(source.const_value.shape) != 2:
        return None
    return _Operand(source, turned=not outputs_first)


def _token_table_of(node: ir.Node) -> _Operand | None:
    """The embedding, where a node looks tokens up; None for any other node."""
    if node.domain or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    table, ids = node.inputs[0], node.inputs[1]
    while ids is not None and (before := ids.producer()) is not None and before.op_type in _SAME_NUMBERS:
        ids = before.inputs[0]
    if table is None or ids is None or ids.name != "input_ids" or not ids.is_graph_input():
        return None
    operand = _constant_matrix(table, True)
    return None if operand is None or operand.turned else operand


def _head(graph: ir.Graph, linears: dict[ir.Node, _Operand]) -> ir.Node | None:
    """The linear layer that gives the logits: the only one they reach back to without another in between.

    Shapes do not tell: a projection can be as wide as the vocabulary.
    """
    logits = next(value for value in graph.outputs if value.name == "logits")
    waiting = [logits.producer()]
    seen: set[ir.Node] = set()
    found: set[ir.Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node.op_type == "Shape":
            continue
        seen.add(node)
        if node in linears:
            found.add(node)
        else:
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found.pop() if len(found) == 1 else None


def write_weights(weights: TracedWeights, path: Path, threads: int, report: Callable[[int], None]) -> None:
    """Fill the data file; `report` is told the source bytes of every finished tensor.

    Raises:
        WeightError: NaN or infinite values, naming the tensor.
        OutputError: the disk is full.
    """
    data = DataFile(path, hashed=False)
    try:
        for tensor in weights.tensors:
            data.write(tensor.stored, 0, tensor.source.numpy().reshape(-1).view(np.uint8))  # mapped, not read
            _unmap(tensor.source)
            report(tensor.source.nbytes)
        with ThreadPoolExecutor(threads, thread_name_prefix="edgephi-pack") as pool:
            for matrix in weights.matrices:
                _write_matrix(matrix, data, pool)
                _unmap(matrix.source)
                report(matrix.source.nbytes)
    finally:
        data.close()


def _unmap(source: ir.TensorProtocol) -> None:
    """Let go of the traced graph's data: Windows deletes no file that is mapped."""
    import onnx_ir as ir

    if isinstance(source, ir.ExternalTensor):
        source.release()


def _write_matrix(matrix: TracedMatrix, data: DataFile, pool: ThreadPoolExecutor) -> None:
    values = matrix.source.numpy()  # mapped, not read
    if matrix.turned:
        values = values.T
    stored, fmt, name = matrix.stored, matrix.stored.format, matrix.source.name or "weight"
    assert fmt is not None and stored.scales is not None
    scales = stored.scales
    step = max(1, VALUES_PER_SLICE // stored.columns)

    def pack(row: int) -> None:
        part: NDArray[np.float32] = np.ascontiguousarray(values[row : row + step], np.float32)
        packed = round_to_nearest(part, fmt, name=name)
        data.write(stored.codes, row, packed.codes)
        data.write(scales, row, packed.scales)
        if stored.zero_points is not None and packed.zero_points is not None:
            data.write(stored.zero_points, row, packed.zero_points)

    for _ in pool.map(pack, range(0, stored.rows, step)):
        pass
