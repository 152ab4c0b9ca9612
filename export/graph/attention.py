"""Attention of one decoder layer, over one operator in the two forms that execution providers take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.export.graph.builder import MS, GraphBuilder, KvCache
from edgephi.export.graph.positions import Positions
from edgephi.export.spec import DecoderSpec

if TYPE_CHECKING:
    import onnx_ir as ir

Inputs = list["ir.Value | None"]

KEY_SCALES = 12
"""GroupQueryAttention's input for the scales of keys in int8; those of the values follow."""


def kv_cache(emit: GraphBuilder, spec: DecoderSpec, layer: int, rows: int | None = None) -> KvCache:
    """A layer's cache as inputs and outputs of the graph.

    Args:
        rows: of a cache of fixed length for one sequence, updated as a whole; None: it grows with the sequences.
    """
    batch, past, total = (1, rows, rows) if rows else ("batch_size", "past_sequence_length", "total_sequence_length")

    def port(name: str, length: str | int) -> ir.Value:
        return emit.port(name, [batch, spec.kv_heads, length, spec.head_dim], emit.cache_type)

    return KvCache(
        past_key=port(f"past_key_values.{layer}.key", past),
        past_value=port(f"past_key_values.{layer}.value", past),
        present_key=port(f"present.{layer}.key", total),
        present_value=port(f"present.{layer}.value", total),
    )


def attention(
    emit: GraphBuilder, spec: DecoderSpec, layer: int, normed: ir.Value, cache: KvCache, positions: Positions
) -> ir.Value:
    """Rotary, KV cache update, causal (windowed, block-sparse) grouped-query attention and output projection.

    [batch, length, hidden] to the same shape.
    """
    base = f"/model/layers.{layer}/attn"
    opened = emit.open_cache(layer, cache)
    form = _separate_inputs if emit.separate_attention else _packed_inputs
    inputs = form(emit, spec, layer, normed, opened, positions)
    if emit.kv_scales is not None:
        inputs += [None] * (KEY_SCALES - len(inputs))
        inputs += _kv_scales(emit, layer)
    name = f"{base}/GroupQueryAttention"
    attended = emit.value(f"{name}/output_0", emit.attention_type)
    outputs = [attended, opened.present_key, opened.present_value]
    emit.node("GroupQueryAttention", name, inputs, outputs, _attributes(emit, spec), MS)
    attended = emit.cast(name, attended, emit.attention_type, emit.float)
    projected = emit.linear(f"{base}/o_proj", attended, f"layers.{layer}.o.weight", f"layers.{layer}.o.bias")
    emit.close_cache(layer, opened, cache)
    return projected


def _attributes(emit: GraphBuilder, spec: DecoderSpec) -> dict[str, int | float | str]:
    """Of GroupQueryAttention, as far as the target takes them."""
    attributes: dict[str, int | float | str] = {
        "num_heads": spec.heads,
        "kv_num_heads": spec.kv_heads,
        "scale": float(spec.head_dim**-0.5) if spec.attention_scale is None else spec.attention_scale,
    }
    if not emit.separate_attention:
        attributes["do_rotary"] = 1
    if emit.bare_attention:
        # halves pair where nothing is said, and these targets' caches are no longer than a window
        return attributes
    if not emit.separate_attention:
        attributes["rotary_interleaved"] = 0
    if spec.sliding_window is not None:
        # both count the position itself: equal numbers mean equal masks
        attributes["local_window_size"] = spec.sliding_window
    if emit.kv_scales is not None:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    return attributes


def _kv_scales(emit: GraphBuilder, layer: int) -> list[ir.Value]:
    """The operator writes keys and values as int8 codes, and reads them back as it multiplies."""
    assert emit.kv_scales is not None
    scales, name = emit.kv_scales[layer], f"model.layers.{layer}.attn"
    return [emit.float32(f"{name}.k_scale", scales.keys), emit.float32(f"{name}.v_scale", scales.values)]


def _packed_inputs(
    emit: GraphBuilder, spec: DecoderSpec, layer: int, normed: ir.Value, cache: KvCache, positions: Positions
) -> Inputs:
    """Of an operator that divides and rotates queries, keys and values itself."""
    name = f"/model/layers.{layer}/attn/qkv_proj"
    qkv = emit.linear(name, normed, f"layers.{layer}.qkv.weight", f"layers.{layer}.qkv.bias")
    qkv = emit.cast(name, qkv, emit.float, emit.attention_type)
    inputs: Inputs = [qkv, None, None, *_past(cache, positions), *_rotary_tables(emit, positions)]
    sparse = spec.block_sparse
    covered = sparse is not None and sparse.covers(layer)
    assert positions.visible is not None or not covered, "a sparse layer would look at all keys"
    visible = positions.visible if covered else None
    if positions.rows is not None or visible is not None:
        inputs.append(positions.rows)
    if visible is not None:
        inputs.append(visible)
    return inputs


def _separate_inputs(
    emit: GraphBuilder, spec: DecoderSpec, layer: int, normed: ir.Value, cache: KvCache, positions: Positions
) -> Inputs:
    """The same from three projections and two rotations, because DirectML's operator takes neither packed nor
    unrotated input. The projections are rows of the stored packed matrix, the same bytes. `rows` has to be given, and
    there is no block-sparse form.

    Source: microsoft/onnxruntime, DmlExecutionProvider/src/Operators/DmlOperatorGroupQueryAttention.cpp.
    """
    assert positions.rows is not None and positions.visible is None and emit.attention_type == emit.float
    base, packed = f"/model/layers.{layer}/attn", f"layers.{layer}.qkv"
    query, keys = spec.query_size, spec.query_size + spec.kv_size
    parts = {"q": (0, query), "k": (query, keys), "v": (keys, keys + spec.kv_size)}
    projected = {
        part: emit.linear_rows(f"{base}/{part}_proj", normed, packed, span, ("qkv_proj", f"{part}_proj"))
        for part, span in parts.items()
    }
    tables = _rotary_tables(emit, positions)
    for part, heads in (("q", spec.heads), ("k", spec.kv_heads)):
        partial = {"num_heads": heads, "rotary_embedding_dim": spec.rope.dim}
        attributes = {"interleaved": 0, **(partial if spec.rope.dim != spec.head_dim else {})}
        inputs = [projected[part], positions.rows, *tables]
        projected[part] = emit.op("RotaryEmbedding", f"{base}/{part}_rotary/RotaryEmbedding", inputs, attributes, MS)
    return [*projected.values(), *_past(cache, positions)]


def _past(cache: KvCache, positions: Positions) -> list[ir.Value]:
    return [cache.past_key, cache.past_value, positions.last, positions.total]


def _rotary_tables(emit: GraphBuilder, positions: Positions) -> list[ir.Value]:
    if positions.tables is not None:
        return list(positions.tables)
    return [emit.vector(name, emit.attention_type) for name in ("cos_cache", "sin_cache")]
