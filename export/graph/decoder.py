"""A DecoderSpec and a storage layout become an ONNX graph: for onnxruntime's CPU provider, or a variant of it.

Inputs and outputs carry onnxruntime-genai's names. Operators of the domain com.microsoft are specified in
microsoft/onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgephi.bundle import LOGIT_ROWS
from edgephi.export.graph.attention import kv_cache
from edgephi.export.graph.builder import OPSET, GraphBuilder, KvScales
from edgephi.export.graph.head import embed, last_rows
from edgephi.export.graph.head import logits as emit_logits
from edgephi.export.graph.layer import decoder_layers
from edgephi.export.graph.norms import add_and_norm
from edgephi.export.graph.positions import positions
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout
from edgephi.export.weights.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

LogitRows = Literal["all", "last", "chosen"]


def build_graph(
    spec: DecoderSpec,
    layout: Layout,
    recipe: Recipe,
    *,
    opset: int = OPSET,
    separate: bool = False,
    row_numbers: bool = True,
    logit_rows: LogitRows = "all",
    kv_scales: Mapping[int, KvScales] | None = None,
    lora: Collection[str] = (),
) -> ir.Model:
    """The whole decoder: token ids and KV cache in, logits and KV cache out.

    Args:
        recipe: its float type is what the graph computes in; what is stored in the other one is cast while it loads.
        opset: of ONNX's own operators; see `variants.cpu_opset`.
        separate: attention takes queries, keys and values apart; the graph then has an input `position_ids`, unless
            it chooses between two ropes itself.
        row_numbers: attention takes rows of the rotary tables by number.
        logit_rows: which tokens of a run get logits: all of them; each sequence's last, [batch, 1, vocabulary];
            or those whose numbers an optional input gives. onnxruntime-genai allocates what the output declares and
            takes no input it does not know, so it runs the first two only.
        kv_scales: of a KV cache in int8, by the layer's number; None: it has the graph's float type.
        lora: canonical names of the weights whose products take low-rank updates as optional inputs.
    """
    import onnx_ir as ir

    emit = GraphBuilder(
        layout,
        recipe,
        opset=opset,
        separate_attention=separate,
        row_numbers=row_numbers,
        kv_scales=kv_scales,
        lora=lora,
    )
    token_ids = emit.port("input_ids", ["batch_size", "sequence_length"], ir.DataType.INT64)
    mask = emit.port("attention_mask", ["batch_size", "total_sequence_length"], ir.DataType.INT64)
    caches = {layer: kv_cache(emit, spec, layer) for layer in range(spec.layers)}
    inputs, where = [token_ids, mask], positions(emit, spec, token_ids, mask)
    if separate and where.rows is None:
        inputs.append(emit.port("position_ids", ["batch_size", "sequence_length"], ir.DataType.INT64))
        where = replace(where, rows=inputs[-1])
    hidden, update = decoder_layers(emit, spec, embed(emit, spec, token_ids), caches, where)
    _, normed = add_and_norm(emit, spec, "norm", hidden, update)
    rows: dict[LogitRows, str | int] = {"all": "sequence_length", "last": 1, "chosen": "logit_rows"}
    picked = None
    if logit_rows == "last":
        normed = last_rows(emit, token_ids, where, normed)
    elif logit_rows == "chosen":
        picked = emit.int64(LOGIT_ROWS, [-1])
        picked.shape = ir.Shape(["logit_rows"])  # of what a run gives; nothing is -1, the last token
        normed = emit.op("Gather", "/lm_head/rows/Gather", [normed, picked], {"axis": 1})
    logits = emit.port("logits", ["batch_size", rows[logit_rows], spec.vocabulary_size])
    emit_logits(emit, spec, normed, logits)
    inputs += [value for cache in caches.values() for value in (cache.past_key, cache.past_value)]
    # an input that is an initializer as well may be left out
    inputs += [optional for optional in (where.rope_switch, picked) if optional is not None]
    inputs += emit.lora_inputs
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
    logit_rows: LogitRows = "all",
    kv_scales: Mapping[int, KvScales] | None = None,
    lora: Collection[str] = (),
) -> None:
    """Write the graph; its weights are references into the data file beside it."""
    import onnx_ir as ir

    graph = build_graph(
        spec,
        layout,
        recipe,
        opset=opset,
        separate=separate,
        row_numbers=row_numbers,
        logit_rows=logit_rows,
        kv_scales=kv_scales,
        lora=lora,
    )
    ir.save(graph, path)
