"""A DecoderSpec and a storage layout become an ONNX graph for onnxruntime's CPU provider.

Inputs and outputs carry onnxruntime-genai's names. Operators of the domain com.microsoft are specified in
microsoft/onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.export.block_sparse import visibility
from edgephi.export.emitter import MS, Emitter
from edgephi.export.head import logits as emit_logits
from edgephi.export.mlp import mlp
from edgephi.export.norms import add_and_norm, first_norm
from edgephi.export.rope_switch import RopeRows, rope_rows
from edgephi.export.spec import DecoderSpec
from edgephi.export.storage import Layout, Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET, MS_OPSET, IR_VERSION = 21, 1, 10


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


def build_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe) -> ir.Model:
    """The whole decoder: token ids and KV cache in, logits and KV cache out."""
    import onnx_ir as ir

    emit = Emitter(layout, recipe)
    token_ids = emit.port("input_ids", ["batch_size", "sequence_length"], ir.DataType.INT64)
    mask = emit.port("attention_mask", ["batch_size", "total_sequence_length"], ir.DataType.INT64)
    caches = [kv_cache(emit, spec, layer) for layer in range(spec.layers)]
    lengths = mask_lengths(emit, mask)
    rope = rope_rows(emit, spec.long_rope, token_ids, lengths.last) if spec.long_rope else None
    sparse = spec.block_sparse
    visible = visibility(emit, sparse, spec.heads, token_ids, lengths.last, lengths.total) if sparse else None
    embedded = emit.lookup("/model/embed_tokens", "embed.weight", token_ids)
    hidden = emit.scaled("/model/embed_tokens", embedded, spec.embedding_scale)
    normed = first_norm(emit, spec, hidden)
    for layer, cache in enumerate(caches):
        seen = visible if sparse and sparse.covers(layer) else None
        attended = attention(emit, spec, layer, normed, cache, lengths, rope, seen)
        if spec.parallel:
            fed = emit.op("Add", f"/model/layers.{layer}/Add", [attended, mlp(emit, spec, layer, normed)])
        else:
            hidden, normed = add_and_norm(emit, spec, f"layers.{layer}.post_norm", hidden, attended)
            fed = mlp(emit, spec, layer, normed)
        following = f"layers.{layer + 1}.input_norm" if layer + 1 < spec.layers else "norm"
        hidden, normed = add_and_norm(emit, spec, following, hidden, fed)
    logits = emit.port("logits", ["batch_size", "sequence_length", spec.vocabulary_size])
    emit_logits(emit, spec, normed, logits)
    past = [value for cache in caches for value in (cache.past_key, cache.past_value)]
    graph = ir.Graph(
        # an input that is an initializer as well may be left out
        inputs=[token_ids, mask, *past, *([rope.switch] if rope else [])],
        outputs=[logits, *(value for cache in caches for value in (cache.present_key, cache.present_value))],
        nodes=emit.nodes,
        initializers=list(emit.initializers.values()),
        opset_imports={"": OPSET, MS: MS_OPSET},
        name="main_graph",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgephi")


def write_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe, path: Path) -> None:
    """Write the graph; its weights are references into the data file beside it."""
    import onnx_ir as ir

    ir.save(build_graph(spec, layout, recipe), path)


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
    rope: RopeRows | None,
    visible: ir.Value | None,
) -> ir.Value:
    """Rotary, KV cache update, causal (windowed, block-sparse) grouped-query attention and output projection."""
    base = f"/model/layers.{layer}/attn"
    qkv = emit.linear(f"{base}/qkv_proj", normed, f"layers.{layer}.qkv.weight", f"layers.{layer}.qkv.bias")
    attributes: dict[str, int | float] = {
        "num_heads": spec.heads,
        "kv_num_heads": spec.kv_heads,
        "scale": float(spec.head_dim**-0.5) if spec.attention_scale is None else spec.attention_scale,
        "do_rotary": 1,
        "rotary_interleaved": 0,
    }
    if spec.sliding_window is not None:
        # both count the position itself: equal numbers mean equal masks
        attributes["local_window_size"] = spec.sliding_window
    tables = [emit.vector("cos_cache"), emit.vector("sin_cache")]
    inputs = [qkv, None, None, cache.past_key, cache.past_value, lengths.last, lengths.total, *tables]
    if rope is not None or visible is not None:
        inputs.append(rope.rows if rope else None)
    if visible is not None:
        inputs.append(visible)
    name = f"{base}/GroupQueryAttention"
    attended = emit.value(f"{name}/output_0")
    emit.node("GroupQueryAttention", name, inputs, [attended, cache.present_key, cache.present_value], attributes, MS)
    return emit.linear(f"{base}/o_proj", attended, f"layers.{layer}.o.weight", f"layers.{layer}.o.bias")
