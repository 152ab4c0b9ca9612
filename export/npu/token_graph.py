"""The graph for a token on the CPU, over the KV cache that the NPU's graphs for the prompt fill.

Linear layers compute as in the CPU's bundle: in float32, with its accuracy level, from the very blocks the NPU's graphs
were compiled from. Attention reads and writes float16 rows of the cache. It takes the NPU's order of a head's channels
and its rotary tables (`export/npu/decoder.py`), so that both see the same keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.npu.static_graph import Stage, emit_stage
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout
from edgephi.export.weights.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

LAYERS_DATA = "layers.onnx.data"
"""The layers' weights in the NPU's form, beside `model.onnx.data`, which has those of embedding and head."""


def token_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe, stage: Stage) -> ir.Model:
    """All layers for one token; inputs and outputs are those of `static_graph.emit_stage`, float16.

    Args:
        layout: of the layers in the NPU's form, vectors in float16.
        recipe: the CPU's, float32.
        stage: of one token, all layers.
    """
    return emit_stage(TokenBuilder(layout, recipe, LAYERS_DATA), spec, stage)


class TokenBuilder(GraphBuilder):
    """All float32 but attention, its rotary tables and the cache, which are the NPU's."""

    bare_attention = True

    @property
    def attention_type(self) -> ir.DataType:
        import onnx_ir as ir

        return ir.DataType.FLOAT16
