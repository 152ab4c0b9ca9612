"""Linear layers as QDQ: int4 and int8 weights times 16-bit activations, products the Hexagon NPU does in integers.

Around them the graph stays float16, as `static_graph.py` writes it: the residual stream and the norms, whose outliers
16 bits of one scale would coarsen, and attention, for which the NPU has an operator in float16 only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgephi.export.graph.builder import DATA_FILE, KvCache
from edgephi.export.npu.encodings import Encoding, Encodings
from edgephi.export.npu.static_graph import Stage, StageBuilder, emit_stage
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout, StoredMatrix, StoredTensor
from edgephi.export.weights.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir


def qdq_stage_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe, encodings: Encodings, stage: Stage) -> ir.Model:
    """The layers of a stage with QDQ linear layers; inputs and outputs are those of `emit_stage`.

    Args:
        layout: of `plan_qdq_storage`.
    """
    return emit_stage(QdqBuilder(layout, recipe, encodings), spec, stage)


class QdqBuilder(StageBuilder):
    """Linear layers quantize what they take and give, the KV cache holds 8 bits a number; between them is float16."""

    def __init__(self, layout: Layout, recipe: Recipe, encodings: Encodings) -> None:
        super().__init__(layout, recipe)
        self._encodings = encodings

    def linear(
        self, name: str, value: ir.Value, weight: str, bias: str | None = None, output: ir.Value | None = None
    ) -> ir.Value:
        assert bias is None or bias not in self._layout.vectors  # `require_expressible` lets none through
        encodings = self._encodings.linear[weight]
        matrix = self._layout.matrices[weight]
        single = {"to": int(self._ir.DataType.FLOAT)}
        wide = self.op("Cast", f"{name}/input/Cast", [value], single)
        taken = self._through(f"{name}/input", wide, encodings.input)
        product = self.op("MatMul", f"{name}/MatMul", [taken, self._decoded(matrix)])
        given = self._through(f"{name}/output", product, encodings.output)
        return self.op("Cast", f"{name}/output/Cast", [given], {"to": int(self.float)}, output=output)

    @property
    def cache_type(self) -> ir.DataType:
        import onnx_ir as ir

        return ir.DataType.UINT8

    def open_cache(self, layer: int, cache: KvCache) -> KvCache:
        base = f"/model/layers.{layer}/attn"
        past = [
            self.op("DequantizeLinear", f"{base}/past_{part}/DequantizeLinear", [codes, *self._of_cache(layer, part)])
            for part, codes in (("key", cache.past_key), ("value", cache.past_value))
        ]
        present = [self.value(f"{base}/present_{part}") for part in ("key", "value")]
        return KvCache(*past, *present)

    def close_cache(self, layer: int, opened: KvCache, cache: KvCache) -> None:
        pairs = {"key": (opened.present_key, cache.present_key), "value": (opened.present_value, cache.present_value)}
        for part, (given, codes) in pairs.items():
            name = f"/model/layers.{layer}/attn/present_{part}/QuantizeLinear"
            self.op("QuantizeLinear", name, [given, *self._of_cache(layer, part)], output=codes)

    def _of_cache(self, layer: int, part: str) -> list[ir.Value]:
        """Scale and zero point."""
        types, name = self._ir.DataType, f"/model/layers.{layer}/attn/{part}"
        found = self._encodings.cache[layer]
        encoding = found.key if part == "key" else found.value
        return [
            self._constant(f"{name}/scale", np.float16(encoding.scale), types.FLOAT16),
            self._constant(f"{name}/zero_point", np.uint8(encoding.zero_point), types.UINT8),
        ]

    def _through(self, name: str, value: ir.Value, encoding: Encoding) -> ir.Value:
        """The value in 16 bits and back."""
        types = self._ir.DataType
        parameters = [
            self._constant(f"{name}/scale", np.float32(encoding.scale), types.FLOAT),
            self._constant(f"{name}/zero_point", np.uint16(encoding.zero_point), types.UINT16),
        ]
        codes = self.op("QuantizeLinear", f"{name}/QuantizeLinear", [value, *parameters])
        return self.op("DequantizeLinear", f"{name}/DequantizeLinear", [codes, *parameters])

    def _decoded(self, matrix: StoredMatrix) -> ir.Value:
        """The weight [columns, rows] from codes, block scales if there are any, and channel scales."""
        assert matrix.channel_scales is not None
        types, rows, name = self._ir.DataType, matrix.rows, matrix.codes.name
        channels, shape = self.stored(matrix.channel_scales), (matrix.columns, rows)
        if matrix.format is None:
            none = self._constant(f"{rows}_int8_zeros", np.zeros(rows, np.int8), types.INT8)
            parts = [self._codes(matrix.codes, shape, types.INT8), channels, none]
            return self.op("DequantizeLinear", f"{name}/DequantizeLinear", parts, {"axis": 1})
        assert matrix.scales is not None
        zeros = self._constant(f"{rows}_zeros", np.zeros(rows, np.uint8), types.UINT8)
        parts = [self.stored(matrix.scales), channels, zeros]
        scales = self.op("DequantizeLinear", f"{name}_scales/DequantizeLinear", parts, {"axis": 1})
        codes = self._codes(matrix.codes, shape, types.INT4)
        # the compiler takes codes for 8 bits wide where no zero point says otherwise
        blocks = matrix.columns // matrix.format.block_size
        parts = [codes, scales, self._int4_zeros((blocks, rows))]
        attributes = {"axis": 0, "block_size": matrix.format.block_size}
        return self.op("DequantizeLinear", f"{name}/DequantizeLinear", parts, attributes)

    def _constant(self, name: str, values: np.ndarray | np.generic, dtype: ir.DataType) -> ir.Value:
        if name not in self.initializers:
            array = np.asarray(values)
            self._add(name, self._ir.tensor(array, name=name), dtype, self._ir.Shape(array.shape))
        return self.initializers[name]

    def _int4_zeros(self, shape: tuple[int, int]) -> ir.Value:
        import ml_dtypes

        name = f"{shape[0]}_{shape[1]}_zeros"
        return self._constant(name, np.zeros(shape, ml_dtypes.int4), self._ir.DataType.INT4)

    def _codes(self, tensor: StoredTensor, shape: tuple[int, int], dtype: ir.DataType) -> ir.Value:
        if tensor.name not in self.initializers:
            ir = self._ir
            dims = ir.Shape(shape)
            data = ir.ExternalTensor(DATA_FILE, tensor.offset, tensor.bytes, dtype, shape=dims, name=tensor.name)
            self._add(tensor.name, data, dtype, dims)
        return self.initializers[tensor.name]
