"""A DecoderSpec and a storage layout become an ONNX graph: for onnxruntime's CPU provider, or a variant of it.

Inputs and outputs carry onnxruntime-genai's names. Operators of the domain com.microsoft are specified in
microsoft/onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.export.graph.attention import attention, kv_cache, mask_lengths, separate_attention
from edgephi.export.graph.block_sparse import visibility
from edgephi.export.graph.builder import MS, OPSET, Emitter
from edgephi.export.graph.head import last_rows
from edgephi.export.graph.head import logits as emit_logits
from edgephi.export.graph.mlp import mlp
from edgephi.export.graph.norms import add_and_norm, first_norm
from edgephi.export.graph.rope_switch import rope_rows
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout, Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

MS_OPSET, IR_VERSION = 1, 10


def build_graph(
    spec: DecoderSpec,
    layout: Layout,
    recipe: Recipe,
    *,
    opset: int = OPSET,
    separate: bool = False,
    last_row: bool = False,
) -> ir.Model:
    """The whole decoder: token ids and KV cache in, logits and KV cache out.

    Args:
        recipe: its float type is what the graph computes in; what is stored in the other one is cast while it loads.
        opset: of ONNX's own operators; see `variants.cpu_opset`.
        separate: the attention's form is `separate_attention`; the graph then has an input `position_ids`, unless it
            chooses between two ropes itself.
        last_row: logits of each sequence's last token only, [batch, 1, vocabulary]. onnxruntime-genai allocates what
            the output declares, so one graph cannot do both.
    """
    import onnx_ir as ir

    emit = Emitter(layout, recipe, opset=opset)
    token_ids = emit.port("input_ids", ["batch_size", "sequence_length"], ir.DataType.INT64)
    mask = emit.port("attention_mask", ["batch_size", "total_sequence_length"], ir.DataType.INT64)
    caches = [kv_cache(emit, spec, layer) for layer in range(spec.layers)]
    lengths = mask_lengths(emit, mask)
    rope = rope_rows(emit, spec.long_rope, token_ids, lengths.last) if spec.long_rope else None
    positions: list[ir.Value] = []
    if separate and rope is None:
        positions = [emit.port("position_ids", ["batch_size", "sequence_length"], ir.DataType.INT64)]
    rows = rope.rows if rope else next(iter(positions), None)
    attend = separate_attention if separate else attention
    sparse = spec.block_sparse
    visible = visibility(emit, sparse, spec.heads, token_ids, lengths.last, lengths.total) if sparse else None
    embedded = emit.lookup("/model/embed_tokens", "embed.weight", token_ids)
    hidden = emit.scaled("/model/embed_tokens", embedded, spec.embedding_scale)
    normed = first_norm(emit, spec, hidden)
    for layer, cache in enumerate(caches):
        seen = visible if sparse and sparse.covers(layer) else None
        attended = attend(emit, spec, layer, normed, cache, lengths, rows, seen)
        if spec.parallel:
            fed = emit.op("Add", f"/model/layers.{layer}/Add", [attended, mlp(emit, spec, layer, normed)])
        else:
            hidden, normed = add_and_norm(emit, spec, f"layers.{layer}.post_norm", hidden, attended)
            fed = mlp(emit, spec, layer, normed)
        following = f"layers.{layer + 1}.input_norm" if layer + 1 < spec.layers else "norm"
        hidden, normed = add_and_norm(emit, spec, following, hidden, fed)
    if last_row:
        normed = last_rows(emit, token_ids, lengths, normed)
    logits = emit.port("logits", ["batch_size", 1 if last_row else "sequence_length", spec.vocabulary_size])
    emit_logits(emit, spec, normed, logits)
    past = [value for cache in caches for value in (cache.past_key, cache.past_value)]
    graph = ir.Graph(
        # an input that is an initializer as well may be left out
        inputs=[token_ids, mask, *positions, *past, *([rope.switch] if rope else [])],
        outputs=[logits, *(value for cache in caches for value in (cache.present_key, cache.present_value))],
        nodes=emit.nodes,
        initializers=list(emit.initializers.values()),
        opset_imports={"": emit.opset, MS: MS_OPSET},
        name="main_graph",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgephi")


def write_graph(
    spec: DecoderSpec,
    layout: Layout,
    recipe: Recipe,
    path: Path,
    *,
    opset: int = OPSET,
    separate: bool = False,
    last_row: bool = False,
) -> None:
    """Write the graph; its weights are references into the data file beside it."""
    import onnx_ir as ir

    ir.save(build_graph(spec, layout, recipe, opset=opset, separate=separate, last_row=last_row), path)
