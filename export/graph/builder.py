"""Nodes, values and initializers of one graph: what every decoder block is written with.

The blocks are written once. Where targets differ, the builder of a target says so by a trait, which a subclass sets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.export.weights.layout import Layout, StoredMatrix, StoredTensor
from edgephi.export.weights.recipe import Recipe
from edgephi.export.weights.repack import OffsetColumns
from edgephi.export.weights.row_slices import matrix_rows, tensor_rows

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

DATA_FILE = "model.onnx.data"
MS = "com.microsoft"
MS_OPSET, IR_VERSION = 1, 10

OPSET = 21
POOLING_OPSET = 18
"""Up to this one onnxruntime's CPU provider has a vectorized AveragePool; that of opset 19 is a plain loop."""

Attributes = Mapping[str, int | float | str | list[int]]


@dataclass(frozen=True)
class KvCache:
    """Keys and values of one layer, [batch, kv_heads, length, head_dim], as they come in and go out."""

    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value


@dataclass(frozen=True)
class KvScales:
    """What a step of the int8 codes of one layer's keys and values is worth, float32 [kv_heads, 1, head_dim]."""

    keys: NDArray[np.float32]
    values: NDArray[np.float32]


class GraphBuilder:
    """The graph so far: nodes in order, and the initializers they use.

    Weights enter as references into the data file; nothing here holds or reads a weight. Initializer and node names
    follow onnxruntime-genai's builder, so that tools written for its graphs find their way.

    Args:
        opset: of ONNX's own operators.
        separate_attention: attention takes queries, keys and values apart and already rotated.
        row_numbers: attention takes rows of the rotary tables by number.
        kv_scales: of a KV cache in int8, by the layer's number; None: it has the float type attention computes in.
        lora: canonical names of the weights to whose products the graph's caller may add low-rank updates.
    """

    fused_norms = True
    """RMSNorm and the addition before it are one operator."""
    bare_attention = False
    """Attention has no attributes beside its sizes, its scale and whether it rotates."""

    def __init__(
        self,
        layout: Layout,
        recipe: Recipe,
        data_file: str = DATA_FILE,
        opset: int = OPSET,
        separate_attention: bool = False,
        row_numbers: bool = True,
        kv_scales: Mapping[int, KvScales] | None = None,
        lora: Collection[str] = (),
    ) -> None:
        import onnx_ir as ir

        self._ir = ir
        self._layout, self._recipe, self._data_file = layout, recipe, data_file
        self._sizes = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "uint8": ir.DataType.UINT8}
        self.opset, self.separate_attention, self.row_numbers = opset, separate_attention, row_numbers
        self.kv_scales = kv_scales
        self.float = self._sizes[recipe.float_type]
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._cast: dict[tuple[str, ir.DataType], ir.Value] = {}
        self._with_means: dict[ir.Value, ir.Value] = {}
        self._made_zeros: dict[int, ir.Value] = {}
        self._lora = lora
        self.lora_inputs: list[ir.Value] = []
        """Optional inputs of the graph, A and B of every update."""

    # --- what targets do differently

    @property
    def attention_type(self) -> ir.DataType:
        """The float type attention computes in."""
        return self.float

    @property
    def cache_type(self) -> ir.DataType:
        """Element type of the KV cache's inputs and outputs."""
        return self.attention_type if self.kv_scales is None else self._ir.DataType.INT8

    def open_cache(self, layer: int, cache: KvCache) -> KvCache:
        """What attention takes and gives, for the graph's inputs and outputs."""
        return cache

    def close_cache(self, layer: int, opened: KvCache, cache: KvCache) -> None:
        """Make the outputs from what attention gave."""

    # --- nodes

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[ir.Value],
        attributes: Attributes | None = None,
        domain: str = "",
    ) -> None:
        """Append a node; None stands for an optional input that is left out."""
        ir = self._ir
        kinds = {float: ir.AttrFloat32, int: ir.AttrInt64, str: ir.AttrString, list: ir.AttrInt64s}
        attrs = [kinds[type(value)](key, value) for key, value in (attributes or {}).items()]
        self.nodes.append(ir.Node(domain, op, inputs, attrs, outputs=outputs, name=name))

    def op(
        self,
        op: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        domain: str = "",
        output: ir.Value | None = None,
    ) -> ir.Value:
        """Append a node with one output, and return that; onnxruntime infers its type."""
        result = output if output is not None else self._ir.Value(name=f"{name}/output_0")
        self.node(op, name, inputs, [result], attributes, domain)
        return result

    def cast(
        self, name: str, value: ir.Value, have: ir.DataType, want: ir.DataType, output: ir.Value | None = None
    ) -> ir.Value:
        """The value in another type; nothing is emitted where it has that already."""
        if have == want:
            assert output is None, "nothing would write to it"
            return value
        return self.op("Cast", f"{name}/Cast", [value], {"to": int(want)}, output=output)

    def linear(
        self, name: str, value: ir.Value, weight: str, bias: str | None = None, output: ir.Value | None = None
    ) -> ir.Value:
        """value · weightᵀ + bias for canonical names; the bias counts only where the model has one."""
        matrix = self._layout.matrices[weight]
        addend = self.vector(bias) if bias is not None and bias in self._layout.vectors else None
        if weight not in self._lora:
            return self._linear(name, value, matrix, addend, output)
        product = self._linear(name, value, matrix, addend, None)
        return self.op("Add", f"{name}/lora/Add", [product, self._low_rank_update(name, value, matrix)], output=output)

    def _low_rank_update(self, name: str, value: ir.Value, matrix: StoredMatrix) -> ir.Value:
        """(value · A) · B for two inputs of the graph, A [columns, rank] and B [rank, rows]; left out, their rank is 0,
        and what is added is zeros."""
        import numpy as np

        base = name.strip("/").replace("/", ".")
        rank = f"{base}.rank"
        empty: dict[str, tuple[tuple[int, int], tuple[int | str, int | str]]] = {
            "A": ((matrix.columns, 0), (matrix.columns, rank)),
            "B": ((0, matrix.rows), (rank, matrix.rows)),
        }
        for part, (shape, given) in empty.items():
            full = f"{base}.lora_{part}.weight"
            nothing = self._ir.tensor(np.zeros(shape, self.float.numpy()), dtype=self.float, name=full)
            self._add(full, nothing, self.float, self._ir.Shape(given))
            self.lora_inputs.append(self.initializers[full])
            value = self.op("MatMul", f"{name}/lora_{part}/MatMul", [value, self.initializers[full]])
        return value

    def linear_rows(
        self, name: str, value: ir.Value, canonical: str, rows: tuple[int, int], renamed: tuple[str, str]
    ) -> ir.Value:
        """The outputs `rows[0]` to `rows[1]` of the linear layer `canonical`, from the same bytes of the data file.

        Args:
            renamed: what the initializers' names say, and what they say instead.
        """
        matrix = matrix_rows(self._layout.matrices[f"{canonical}.weight"], *rows, renamed)
        bias = self._layout.vectors.get(f"{canonical}.bias")
        addend = None if bias is None else self.in_float(tensor_rows(bias, *rows, renamed))
        return self._linear(name, value, matrix, addend, None)

    def _linear(
        self, name: str, value: ir.Value, matrix: StoredMatrix, addend: ir.Value | None, output: ir.Value | None
    ) -> ir.Value:
        if matrix.format is not None:
            return self._block_linear(name, value, matrix, addend, output)
        # stored as published, [outputs, inputs]; MatMul would need a transposed copy
        inputs = [value, self.stored(matrix.codes)]
        if addend is None:
            return self.op("FusedMatMul", f"{name}/MatMul", inputs, {"transB": 1}, MS, output)
        product = self.op("FusedMatMul", f"{name}/MatMul", inputs, {"transB": 1}, MS)
        return self.op("Add", f"{name}/Add", [product, addend], output=output)

    def _block_linear(
        self, name: str, value: ir.Value, matrix: StoredMatrix, bias: ir.Value | None, output: ir.Value | None
    ) -> ir.Value:
        assert matrix.format is not None and matrix.scales is not None
        zero_points = self.stored(matrix.zero_points) if matrix.zero_points is not None else None
        if matrix.offsets is not None:
            value = self._with_block_means(name, value, matrix.offsets, matrix.format.block_size)
        inputs = [value, self.stored(matrix.codes), self.scales(matrix), zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {
            "K": matrix.inputs,
            "N": matrix.rows,
            "bits": matrix.format.bits,
            "block_size": matrix.format.block_size,
            "accuracy_level": self._recipe.accuracy_level,
        }
        return self.op("MatMulNBits", f"{name}/MatMulNBits", inputs, attributes, MS, output)

    def _with_block_means(self, name: str, value: ir.Value, added: OffsetColumns, block_size: int) -> ir.Value:
        """The inputs, and for each set of offsets the means of their blocks and zeros; once for all readers."""
        if value not in self._with_means:
            means = self._block_means(f"{name}/block_means", value, block_size)
            parts = [value]
            for zeros in added.zeros:
                parts += [means, self._zeros(value, zeros)] if zeros else [means]
            self._with_means[value] = self.op("Concat", f"{name}/block_means/Concat", parts, {"axis": -1})
        return self._with_means[value]

    def _zeros(self, like: ir.Value, width: int) -> ir.Value:
        """[batch, length, width] as all layers' values have it, made once for the whole graph."""
        if width not in self._made_zeros:
            base, bounds = f"model/zeros_{width}", (("start", 0), ("end", 1), ("axis", -1))
            cut = [like, *(self.int64(f"zeros/{key}", [number]) for key, number in bounds)]
            column = self.op("Mul", f"{base}/Mul", [self.op("Slice", f"{base}/Slice", cut), self.scalar("zero", 0.0)])
            shape = self.int64(f"{base}/shape", [1, 1, width])
            self._made_zeros[width] = self.op("Expand", f"{base}/Expand", [column, shape])
        return self._made_zeros[width]

    def _block_means(self, name: str, value: ir.Value, block_size: int) -> ir.Value:
        """[batch, length, columns] to [batch, length, columns / block_size]."""
        if self.opset <= POOLING_OPSET:
            # one node for two: 3 % of SmolLM2-135M's decode. Tokens are its channels, of which it wants no fixed number
            window = {"kernel_shape": [block_size], "strides": [block_size]}
            return self.op("AveragePool", f"{name}/AveragePool", [value], window)
        shape = self.int64("block_shape", [0, 0, -1, block_size])
        blocks = self.op("Reshape", f"{name}/Reshape", [value, shape])
        return self.op("ReduceMean", f"{name}/ReduceMean", [blocks, self.int64("block_axis", [-1])], {"keepdims": 0})

    def in_float(self, tensor: StoredTensor, dtype: ir.DataType | None = None) -> ir.Value:
        """A stored tensor in a float type, the graph's unless told; onnxruntime casts constants while it loads."""
        stored, want = self.stored(tensor), dtype or self.float
        if stored.dtype == want:
            return stored
        if (tensor.name, want) not in self._cast:
            self._cast[tensor.name, want] = self.op("Cast", f"{tensor.name}/Cast", [stored], {"to": int(want)})
        return self._cast[tensor.name, want]

    def scales(self, matrix: StoredMatrix) -> ir.Value:
        """A matrix's scales in the graph's float type; what they were multiplied by is taken off while it loads."""
        assert matrix.scales is not None
        wide = self.in_float(matrix.scales)
        if not matrix.scale_exponent:
            return wide
        name = f"{matrix.scales.name}/Mul"
        if (name, self.float) not in self._cast:
            assert (
                self.float == self._ir.DataType.FLOAT
            )  # float16 does not hold the result: `export/weights/half_range.py`
            factor = self.scalar(f"scale_factor_{matrix.scale_exponent}", 2.0**-matrix.scale_exponent)
            self._cast[name, self.float] = self.op("Mul", name, [wide, factor])
        return self._cast[name, self.float]

    def lookup(self, name: str, weight: str, ids: ir.Value) -> ir.Value:
        """Rows of a matrix by id; a quantized one shares its bytes with the head that multiplies by it."""
        table = self._layout.matrices[weight]
        if table.format is None:
            return self.op("Gather", f"{name}/Gather", [self.stored(table.codes), ids])
        assert table.format.bits == 8 and table.scales is not None
        # MatMulNBits wants [rows, blocks, block], the lookup [rows, columns]: two shapes over one place in the file
        rows = StoredTensor(f"{table.codes.name}_rows", table.codes.offset, (table.rows, table.columns), "uint8")
        attributes = {"bits": 8, "block_size": table.format.block_size, "gather_axis": 0, "quantize_axis": 1}
        inputs = [self.stored(rows), ids, self.scales(table)]
        return self.op("GatherBlockQuantized", f"{name}/GatherBlockQuantized", inputs, attributes, MS)

    def stores(self, weight: str) -> bool:
        """Whether the data file has this matrix, given by its canonical name."""
        return weight in self._layout.matrices

    @property
    def accuracy_level(self) -> int:
        """MatMulNBits' attribute, for operators that share it."""
        return self._recipe.accuracy_level

    def stack(self, name: str) -> StoredMatrix:
        """The experts of a layer, stacked."""
        return self._layout.stacks[name]

    # --- values

    def value(self, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """An intermediate value, of the graph's float type unless told."""
        return self._ir.Value(name=name, type=self._ir.TensorType(dtype or self.float))

    def absent(self) -> ir.Value:
        """An optional output that nobody reads."""
        return self._ir.Value(name="")

    def port(self, name: str, shape: Sequence[str | int], dtype: ir.DataType | None = None) -> ir.Value:
        """An input or output of the graph."""
        return self._ir.Value(name=name, type=self._ir.TensorType(dtype or self.float), shape=self._ir.Shape(shape))

    def vector(self, canonical: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A norm gain, a bias or a rotary table, in the graph's float type unless told."""
        return self.in_float(self._layout.vectors[canonical], dtype)

    def stored(self, tensor: StoredTensor) -> ir.Value:
        """A place in the data file as an initializer."""
        if tensor.name not in self.initializers:
            shape = self._ir.Shape(tensor.shape)
            dtype = self._sizes[tensor.dtype]
            place = (self._data_file, tensor.offset, tensor.bytes, dtype)
            self._add(tensor.name, self._ir.ExternalTensor(*place, shape=shape, name=tensor.name), dtype, shape)
        return self.initializers[tensor.name]

    def int64(self, name: str, numbers: int | list[int]) -> ir.Value:
        """A small constant, kept in the graph itself."""
        if name not in self.initializers:
            dtype = self._ir.DataType.INT64
            shape = self._ir.Shape([] if isinstance(numbers, int) else [len(numbers)])
            self._add(name, self._ir.tensor(numbers, dtype=dtype, name=name), dtype, shape)
        return self.initializers[name]

    def scalar(self, name: str, number: float) -> ir.Value:
        """A small constant of the graph's float type."""
        if name not in self.initializers:
            shape = self._ir.Shape([])
            self._add(name, self._ir.tensor(number, dtype=self.float, name=name), self.float, shape)
        return self.initializers[name]

    def float32(self, name: str, numbers: NDArray[np.float32]) -> ir.Value:
        """A small array, kept in the graph itself."""
        if name not in self.initializers:
            dtype, shape = self._ir.DataType.FLOAT, self._ir.Shape(numbers.shape)
            self._add(name, self._ir.tensor(numbers, dtype=dtype, name=name), dtype, shape)
        return self.initializers[name]

    def lowest(self) -> ir.Value:
        """The lowest finite number of the graph's float type, a scalar."""
        import numpy as np

        return self.scalar("lowest", float(np.finfo(self.float.numpy()).min))

    def scaled(self, name: str, value: ir.Value, factor: float) -> ir.Value:
        """value · factor; nothing is emitted for a factor of 1."""
        if factor == 1.0:
            return value
        return self.op("Mul", f"{name}/Mul", [value, self.scalar(f"{name}/factor", factor)])

    def _add(self, name: str, data: ir.TensorProtocol, dtype: ir.DataType, shape: ir.Shape) -> None:
        self.initializers[name] = self._ir.Value(
            name=name, type=self._ir.TensorType(dtype), shape=shape, const_value=data
        )

    # --- the whole

    def model(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str = "main_graph") -> ir.Model:
        """The nodes so far as a model."""
        graph = self._ir.Graph(
            inputs=inputs,
            outputs=outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": self.opset, MS: MS_OPSET},
            name=name,
        )
        return self._ir.Model(graph, ir_version=IR_VERSION, producer_name="edgephi")
