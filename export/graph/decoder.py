"""A DecoderSpec and a storage layout become an ONNX graph: for onnxruntime's CPU provider, or a variant of it.

Inputs and outputs carry onnxruntime-genai's names. Operators of the domain com.microsoft are specified in
microsoft/onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.export.graph.attention import kv_cache
from edgephi.export.graph.builder import OPSET, GraphBuilder
from edgephi.export.graph.head import embed, last_rows
from edgephi.export.graph.head import logits as emit_logits
from edgephi.export.graph.layer import decoder_layers
from edgephi.export.graph.norms import add_and_norm
from edgephi.export.graph.positions import positions
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout, Recipe

if TYPE_CHECKING:
    import onnx_ir as ir


def build_graph(
    spec: DecoderSpec,
    layout: Layout,
    recipe: Recipe,
    *,
    opset: int = OPSET,
    separate: bool = False,
    row_numbers: bool = True,
    last_row: bool = False,
) -> ir.Model:
    """The whole decoder: token ids and KV cache in, logits and KV cache out.

    Args:
        recipe: its float type is what the graph computes in; what is stored in the other one is cast while it loads.
        opset: of ONNX's own operators; see `variants.cpu_opset`.
        separate: attention takes queries, keys and values apart; the graph then has an input `position_ids`, unless
            it chooses between two ropes itself.
        row_numbers: attention takes rows of the rotary tables by number.
        last_row: logits of each sequence's last token only, [batch, 1, vocabulary]. onnxruntime-genai allocates what
            the output declares, so one graph cannot do both.
    """
    import onnx_ir as ir

    emit = GraphBuilder(layout, recipe, opset=opset, separate_attention=separate, row_numbers=row_numbers)
    token_ids = emit.port("input_ids", ["batch_size", "sequence_length"], ir.DataType.INT64)
    mask = emit.port("attention_mask", ["batch_size", "total_sequence_length"], ir.DataType.INT64)
    caches = {layer: kv_cache(emit, spec, layer) for layer in range(spec.layers)}
    inputs, where = [token_ids, mask], positions(emit, spec, token_ids, mask)
    if separate and where.rows is None:
        inputs.append(emit.port("position_ids", ["batch_size", "sequence_length"], ir.DataType.INT64))
        where = replace(where, rows=inputs[-1])
    hidden, update = decoder_layers(emit, spec, embed(emit, spec, token_ids), caches, where)
    _, normed = add_and_norm(emit, spec, "norm", hidden, update)
    if last_row:
        normed = last_rows(emit, token_ids, where, normed)
    logits = emit.port("logits", ["batch_size", 1 if last_row else "sequence_length", spec.vocabulary_size])
    emit_logits(emit, spec, normed, logits)
    inputs += [value for cache in caches.values() for value in (cache.past_key, cache.past_value)]
    if where.rope_switch is not None:
        inputs.append(where.rope_switch)  # an input that is an initializer as well may be left out
    present = [value for cache in caches.values() for value in (cache.present_key, cache.present_value)]
    return emit.model(inputs, [logits, *present])


def write_graph(
    spec: DecoderSpec,
    layout: Layout,
    recipe: Recipe,
    path: Path,
    *,
    opset: int = OPSET,
    separate: bool = False,
    row_numbers: bool = True,
    last_row: bool = False,
) -> None:
    """Write the graph; its weights are references into the data file beside it."""
    import onnx_ir as ir

    form = {"separate": separate, "row_numbers": row_numbers, "last_row": last_row}
    ir.save(build_graph(spec, layout, recipe, opset=opset, **form), path)
