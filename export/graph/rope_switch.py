"""Which rows of the rotary tables a token takes, in a model whose long sequences have a rope of their own.

The tables hold the short rope's rows and after them the long one's. Where GroupQueryAttention takes rows by number,
choosing costs an addition. Elsewhere (WebGPU's has that input and does not read it) the graph cuts out as many rows as
the sequence has tokens, once a run for all layers. Two tables behind an `If` would be copied whole at every step.

Keys that were cached by a sequence of at most `switch` tokens are wrong in a longer one. A caller has to compute them
again (onnxruntime-genai does at 4,096 tokens, while it generates, and nowhere else); the graph refuses to go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.bundle import ROPE_SWITCH
from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.spec import LongRope

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class RopeChoice:
    """The choice, as part of the graph: `rows` or `tables`."""

    rows: ir.Value | None
    """int64 [batch, length]: GroupQueryAttention's `position_ids`."""
    tables: tuple[ir.Value, ir.Value] | None
    """cos and sin [past and new length, pairs], where a token's row is its position."""
    switch: ir.Value
    """int64 [1], a graph input with a default: the length up to which a sequence takes the short rope. A caller that
    computes a long prompt in pieces gives 0, because the first pieces do not look long."""


def choose_rope(
    emit: GraphBuilder, long_rope: LongRope, token_ids: ir.Value, last: ir.Value, total: ir.Value
) -> RopeChoice:
    """For the tokens of one run.

    Args:
        token_ids: int64 [batch, length].
        last: int32 [batch], index of each sequence's last token.
        total: int32 scalar, length of the longest sequence, past and padding included.
    """
    import onnx_ir as ir

    base = "/model/rope_switch"
    zero, one = emit.int64("rope_zero", [0]), emit.int64("rope_one", [1])
    short_rows = emit.int64("rope_short_rows", [long_rope.switch])
    switch = emit.int64(ROPE_SWITCH, [long_rope.switch])
    index = emit.op("Cast", f"{base}/last/Cast", [last], {"to": int(ir.DataType.INT64)})
    totals = emit.op("Add", f"{base}/total/Add", [index, one])
    length = emit.op("Shape", f"{base}/length/Shape", [token_ids], {"start": 1, "end": 2})
    # a prompt shorter than its neighbours in the batch is padded at its end; it too starts at 0
    past = emit.op("Max", f"{base}/past/Max", [emit.op("Sub", f"{base}/past/Sub", [totals, length]), zero])
    # beyond the model's own switch there are no short rows
    limit = emit.op("Min", f"{base}/limit/Min", [switch, short_rows])
    # one rope for the whole batch, as in transformers; of a batch of prompts the operator reads the first row only
    longest = emit.op("ReduceMax", f"{base}/ReduceMax", [totals], {"keepdims": 1})
    is_long = emit.op("Greater", f"{base}/Greater", [longest, limit])
    offset = emit.op("Where", f"{base}/Where", [is_long, _row_if_sound(emit, is_long, past, limit), zero])
    if not emit.row_numbers:
        return RopeChoice(None, _cut_tables(emit, offset, total), switch)
    first = emit.op("Add", f"{base}/first/Add", [past, offset])
    column = emit.op("Unsqueeze", f"{base}/first/Unsqueeze", [first, one])
    count = emit.op("Squeeze", f"{base}/length/Squeeze", [length])
    steps = emit.op("Range", f"{base}/Range", [emit.int64("rope_start", 0), count, emit.int64("rope_step", 1)])
    return RopeChoice(emit.op("Add", f"{base}/rows/Add", [column, steps]), None, switch)


def _cut_tables(emit: GraphBuilder, first: ir.Value, total: ir.Value) -> tuple[ir.Value, ir.Value]:
    """`total` rows of the stored tables from row `first` (int64 [1]) on."""
    import onnx_ir as ir

    base, axis = "/model/rope_switch/tables", emit.int64("rope_table_axis", [0])
    count = emit.op("Cast", f"{base}/Cast", [total], {"to": int(ir.DataType.INT64)})
    end = emit.op("Add", f"{base}/Add", [first, count])
    cos, sin = (
        emit.op("Slice", f"{base}/{name}/Slice", [emit.vector(name, emit.attention_type), first, end, axis])
        for name in ("cos_cache", "sin_cache")
    )
    return cos, sin


def _row_if_sound(emit: GraphBuilder, is_long: ir.Value, past: ir.Value, limit: ir.Value) -> ir.Value:
    """The long rope's first row; the run fails if the sequence is long and the cache is of a short one.

    ONNX has no assertion: Gather is asked for the second of one element, and its name says what is wrong.
    """
    import onnx_ir as ir

    base = "/model/rope_switch/stale"
    cached = emit.op("ReduceMax", f"{base}/ReduceMax", [past], {"keepdims": 1})
    begun = emit.op("Greater", f"{base}/Greater", [cached, emit.int64("rope_zero", [0])])
    short = emit.op("LessOrEqual", f"{base}/LessOrEqual", [cached, limit])
    stale = emit.op("And", f"{base}/And_1", [is_long, emit.op("And", f"{base}/And", [begun, short])])
    index = emit.op("Cast", f"{base}/Cast", [stale], {"to": int(ir.DataType.INT64)})
    name = "/model/rope_switch/the_sequence_became_long_compute_it_again_from_its_first_token"
    return emit.op("Gather", name, [emit.initializers["rope_short_rows"], index], {"axis": 0})


def write_long_rope_adapter(path: Path) -> None:
    """Write the onnxruntime adapter that sets the graph's optional input to 0.

    onnxruntime-genai hands a graph only inputs it knows and adapters; with this one active, a prompt that is longer
    than the switch may be computed in pieces.
    """
    import numpy as np
    import onnxruntime as ort

    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({ROPE_SWITCH: ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.int64))})
    adapter.export_adapter(str(path))
