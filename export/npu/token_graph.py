"""The graph for a token on the CPU, over the KV cache that the NPU's graphs for the prompt fill.

Linear layers compute as in the CPU's bundle: in float32, with its accuracy level, from the very blocks the NPU's graphs
were compiled from. Attention reads and writes float16 rows of the cache. It takes the NPU's order of a head's channels
and its rotary tables (`export/npu/decoder.py`), so that both see the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgephi.export.graph.attention import KvCache
from edgephi.export.graph.builder import MS, Emitter
from edgephi.export.graph.mlp import mlp
from edgephi.export.graph.norms import add_and_norm, first_norm
from edgephi.export.npu.static_graph import LAST, TOTAL, Stage, as_model, hidden_name
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout, Recipe

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
    import onnx_ir as ir

    emit, half = Emitter(layout, recipe, LAYERS_DATA), ir.DataType.FLOAT16
    hidden_shape = [1, 1, spec.hidden_size]
    taken = emit.port(hidden_name(stage.first), hidden_shape, half)
    last = emit.port(LAST, [1, 1], ir.DataType.INT32)
    total = emit.port(TOTAL, [1], ir.DataType.INT32)
    inputs, outputs = [taken, last, total], []
    hidden = emit.op("Cast", "/model/hidden/Cast", [taken], {"to": int(emit.float)})
    normed = first_norm(emit, spec, hidden)
    for layer in stage.layers:
        cache = _kv_cache(emit, spec, layer, stage.cache_rows)
        inputs += [cache.past_key, cache.past_value]
        outputs += [cache.present_key, cache.present_value]
        tables = [emit.stored(layout.vectors[name]) for name in ("cos_cache", "sin_cache")]
        attended = _attention(emit, spec, layer, normed, cache, [last, total, *tables])
        hidden, normed = add_and_norm(emit, spec, f"layers.{layer}.post_norm", hidden, attended)
        following = "norm" if layer + 1 == spec.layers else f"layers.{layer + 1}.input_norm"
        hidden, normed = add_and_norm(emit, spec, following, hidden, mlp(emit, spec, layer, normed))
    given = emit.port(hidden_name(stage.last), hidden_shape, half)
    emit.op("Cast", "/model/normed/Cast", [normed], {"to": int(half)}, output=given)
    return as_model(emit, stage.name, inputs, [given, *outputs])


def _kv_cache(emit: Emitter, spec: DecoderSpec, layer: int, rows: int) -> KvCache:
    import onnx_ir as ir

    shape, half = [1, spec.kv_heads, rows, spec.head_dim], ir.DataType.FLOAT16
    return KvCache(
        past_key=emit.port(f"past_key_values.{layer}.key", shape, half),
        past_value=emit.port(f"past_key_values.{layer}.value", shape, half),
        present_key=emit.port(f"present.{layer}.key", shape, half),
        present_value=emit.port(f"present.{layer}.value", shape, half),
    )


def _attention(
    emit: Emitter, spec: DecoderSpec, layer: int, normed: ir.Value, cache: KvCache, lengths_and_tables: list[ir.Value]
) -> ir.Value:
    import onnx_ir as ir

    base = f"/model/layers.{layer}/attn"
    qkv = emit.linear(f"{base}/qkv_proj", normed, f"layers.{layer}.qkv.weight")
    half = emit.op("Cast", f"{base}/qkv_proj/Cast", [qkv], {"to": int(ir.DataType.FLOAT16)})
    attributes: Mapping[str, int | float] = {
        "num_heads": spec.heads,
        "kv_num_heads": spec.kv_heads,
        "scale": float(spec.head_dim**-0.5) if spec.attention_scale is None else spec.attention_scale,
        "do_rotary": 1,
    }
    inputs = [half, None, None, cache.past_key, cache.past_value, *lengths_and_tables]
    name = f"{base}/GroupQueryAttention"
    attended = ir.Value(name=f"{name}/output_0", type=ir.TensorType(ir.DataType.FLOAT16))
    emit.node("GroupQueryAttention", name, inputs, [attended, cache.present_key, cache.present_value], attributes, MS)
    single = emit.op("Cast", f"{name}/Cast", [attended], {"to": int(emit.float)})
    return emit.linear(f"{base}/o_proj", single, f"layers.{layer}.o.weight")
