"""Attention of one decoder layer, in the two forms that execution providers take: see `attention` and
`separate_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.export.graph.builder import MS, Emitter
from edgephi.export.spec import DecoderSpec

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class KvCache:
    """Keys and values of one layer, [batch, kv_heads, length, head_dim], as they come in and go out."""

    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value


@dataclass(frozen=True)
class Lengths:
    """The attention mask as GroupQueryAttention wants it."""

    last: ir.Value
    """int32 [batch]: index of each sequence's last token."""
    total: ir.Value
    """int32 scalar: length of the longest sequence, past included."""


def kv_cache(emit: Emitter, spec: DecoderSpec, layer: int) -> KvCache:
    def port(name: str, length: str) -> ir.Value:
        return emit.port(name, ["batch_size", spec.kv_heads, length, spec.head_dim])

    return KvCache(
        past_key=port(f"past_key_values.{layer}.key", "past_sequence_length"),
        past_value=port(f"past_key_values.{layer}.value", "past_sequence_length"),
        present_key=port(f"present.{layer}.key", "total_sequence_length"),
        present_value=port(f"present.{layer}.value", "total_sequence_length"),
    )


def mask_lengths(emit: Emitter, mask: ir.Value) -> Lengths:
    import onnx_ir as ir

    base, int32 = "/model/attn_mask_reformat", {"to": int(ir.DataType.INT32)}
    summed = emit.op("ReduceSum", f"{base}/ReduceSum", [mask, emit.int64("mask_axis", [1])], {"keepdims": 0})
    last = emit.op("Sub", f"{base}/Sub", [summed, emit.int64("one", [1])])
    shape = emit.op("Shape", f"{base}/Shape", [mask])
    total = emit.op("Gather", f"{base}/Gather", [shape, emit.int64("length_axis", 1)], {"axis": 0})
    return Lengths(
        last=emit.op("Cast", f"{base}/Sub/Cast", [last], int32),
        total=emit.op("Cast", f"{base}/Gather/Cast", [total], int32),
    )


def attention(
    emit: Emitter,
    spec: DecoderSpec,
    layer: int,
    normed: ir.Value,
    cache: KvCache,
    lengths: Lengths,
    rows: ir.Value | None,
    visible: ir.Value | None,
) -> ir.Value:
    """Rotary, KV cache update, causal (windowed, block-sparse) grouped-query attention and output projection.

    One operator does it all, on the CPU and on WebGPU.

    Args:
        rows: int64 [batch, length], the rotary tables' row for each token; None: its position.
        visible: what is added to the scores of a block-sparse layer.
    """
    base = _base(layer)
    qkv = emit.linear(f"{base}/qkv_proj", normed, f"layers.{layer}.qkv.weight", f"layers.{layer}.qkv.bias")
    tables = [emit.vector("cos_cache"), emit.vector("sin_cache")]
    inputs = [qkv, None, None, cache.past_key, cache.past_value, lengths.last, lengths.total, *tables]
    if rows is not None or visible is not None:
        inputs.append(rows)
    if visible is not None:
        inputs.append(visible)
    return _attend(emit, spec, layer, inputs, cache, {"do_rotary": 1, "rotary_interleaved": 0})


def separate_attention(
    emit: Emitter,
    spec: DecoderSpec,
    layer: int,
    normed: ir.Value,
    cache: KvCache,
    lengths: Lengths,
    rows: ir.Value | None,
    visible: ir.Value | None,
) -> ir.Value:
    """The same from three projections and two rotations, because DirectML's operator takes neither packed nor
    unrotated input. The projections are rows of the stored packed matrix, the same bytes. `rows` has to be given, and
    there is no block-sparse form.

    Source: microsoft/onnxruntime, DmlExecutionProvider/src/Operators/DmlOperatorGroupQueryAttention.cpp.
    """
    assert rows is not None and visible is None
    base, packed = _base(layer), f"layers.{layer}.qkv"
    query, keys = spec.query_size, spec.query_size + spec.kv_size
    parts = {"q": (0, query), "k": (query, keys), "v": (keys, keys + spec.kv_size)}
    projected = {
        part: emit.linear_rows(f"{base}/{part}_proj", normed, packed, span, ("qkv_proj", f"{part}_proj"))
        for part, span in parts.items()
    }
    tables = [emit.vector("cos_cache"), emit.vector("sin_cache")]
    for part, heads in (("q", spec.heads), ("k", spec.kv_heads)):
        partial = {"num_heads": heads, "rotary_embedding_dim": spec.rope.dim}
        attributes = {"interleaved": 0, **(partial if spec.rope.dim != spec.head_dim else {})}
        inputs = [projected[part], rows, *tables]
        projected[part] = emit.op("RotaryEmbedding", f"{base}/{part}_rotary/RotaryEmbedding", inputs, attributes, MS)
    cached = [cache.past_key, cache.past_value, lengths.last, lengths.total]
    return _attend(emit, spec, layer, [*projected.values(), *cached], cache, {})


def _attend(
    emit: Emitter,
    spec: DecoderSpec,
    layer: int,
    inputs: list[ir.Value | None],
    cache: KvCache,
    rotary: dict[str, int | float],
) -> ir.Value:
    base = _base(layer)
    attributes: dict[str, int | float] = {
        "num_heads": spec.heads,
        "kv_num_heads": spec.kv_heads,
        "scale": float(spec.head_dim**-0.5) if spec.attention_scale is None else spec.attention_scale,
        **rotary,
    }
    if spec.sliding_window is not None:
        # both count the position itself: equal numbers mean equal masks
        attributes["local_window_size"] = spec.sliding_window
    name = f"{base}/GroupQueryAttention"
    attended = emit.value(f"{name}/output_0")
    emit.node("GroupQueryAttention", name, inputs, [attended, cache.present_key, cache.present_value], attributes, MS)
    return emit.linear(f"{base}/o_proj", attended, f"layers.{layer}.o.weight", f"layers.{layer}.o.bias")


def _base(layer: int) -> str:
    return f"/model/layers.{layer}/attn"
