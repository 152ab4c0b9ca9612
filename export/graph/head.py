"""The two ends of a decoder: token ids become hidden states, and hidden states become logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.spec import HEAD, DecoderSpec

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgephi.export.graph.positions import Positions


def embed(emit: GraphBuilder, spec: DecoderSpec, token_ids: ir.Value) -> ir.Value:
    """Token ids, int64 [batch, length], to the hidden states before the first layer, [batch, length, hidden]."""
    base = "/model/embed_tokens"
    return emit.scaled(base, emit.lookup(base, "embed.weight", token_ids), spec.embedding_scale)


def last_rows(emit: GraphBuilder, token_ids: ir.Value, positions: Positions, normed: ir.Value) -> ir.Value:
    """Hidden states [batch, 1, hidden] of each sequence's last token in this run.

    A prompt shorter than its neighbours in the batch is padded at its end: its last token is not in the last row.
    """
    import onnx_ir as ir

    base = "/lm_head/last_row"
    last = emit.op("Cast", f"{base}/Cast", [positions.last], {"to": int(ir.DataType.INT64)})
    count = emit.op("Shape", f"{base}/Shape", [token_ids], {"start": 1, "end": 2})
    newest = emit.op("Sub", f"{base}/Sub", [count, emit.int64("one", [1])])
    index = emit.op("Min", f"{base}/Min", [last, newest])  # behind a cache there is no padding
    column = emit.op("Unsqueeze", f"{base}/Unsqueeze", [index, emit.int64("last_row_axes", [1, 2])])
    return emit.op("GatherND", f"{base}/GatherND", [normed, column], {"batch_dims": 1})


def head_inputs(emit: GraphBuilder, spec: DecoderSpec, normed: ir.Value) -> ir.Value:
    """What the head multiplies: normalized hidden states, where the decoder has it turned or scaled."""
    if spec.head_input:
        normed = emit.linear("/lm_head/input_proj", normed, "head_input.weight", "head_input.bias")
    return emit.scaled("/lm_head/scale", normed, spec.head_scale)


def logits(emit: GraphBuilder, spec: DecoderSpec, normed: ir.Value, output: ir.Value) -> None:
    """Write logits of every row of `normed` to `output`, the suppressed tokens' at the lowest number."""
    head = HEAD if emit.stores(HEAD) else "embed.weight"
    scaled = head_inputs(emit, spec, normed)
    if not spec.suppressed_tokens:
        emit.linear("/lm_head", scaled, head, "head.bias", output=output)
        return
    raw = emit.linear("/lm_head", scaled, head, "head.bias")
    # onnxruntime folds this into a constant, and adds in place
    base, count = "/lm_head/suppressed", len(spec.suppressed_tokens)
    vocabulary = emit.int64("vocabulary_size", [spec.vocabulary_size])
    zeros = emit.op("Expand", f"{base}/zeros/Expand", [emit.scalar("zero", 0.0), vocabulary])
    lowest = emit.op("Expand", f"{base}/lowest/Expand", [emit.lowest(), emit.int64("suppressed_count", [count])])
    ids = emit.int64("suppressed_tokens", list(spec.suppressed_tokens))
    penalty = emit.op("ScatterElements", f"{base}/ScatterElements", [zeros, ids, lowest], {"axis": 0})
    emit.op("Add", f"{base}/Add", [raw, penalty], output=output)
