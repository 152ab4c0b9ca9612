"""Where the tokens of a run stand in their sequences, and which keys they may look at: the same for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.export.graph.block_sparse import visibility
from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.graph.rope_switch import RopeChoice, choose_rope
from edgephi.export.spec import DecoderSpec

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Positions:
    """What attention takes beside values and cache; lengths are those GroupQueryAttention asks for."""

    last: ir.Value
    """int32 [batch]: index of each sequence's last token."""
    total: ir.Value
    """int32 scalar: length of the longest sequence, past included."""
    rows: ir.Value | None = None
    """int64 [batch, length], the rotary tables' row for each token; None: its position."""
    tables: tuple[ir.Value, ir.Value] | None = None
    """Rotary tables of this run, cos and sin; None: the stored ones."""
    rope_switch: ir.Value | None = None
    """A graph input with a default that chooses between two ropes: see `RopeChoice`."""
    visible: ir.Value | None = None
    """What is added to the scores of a block-sparse layer."""


def positions(emit: GraphBuilder, spec: DecoderSpec, tokens: ir.Value, mask: ir.Value) -> Positions:
    """Read them from the attention mask.

    Args:
        tokens: [batch, length, ...]; only its length is read.
        mask: int64 [batch, past and new length], 1 for a token and 0 for padding.
    """
    last, total = _lengths(emit, mask)
    rope: RopeChoice | None = choose_rope(emit, spec.long_rope, tokens, last, total) if spec.long_rope else None
    sparse = spec.block_sparse
    visible = visibility(emit, sparse, spec.heads, tokens, last, total) if sparse else None
    if rope is None:
        return Positions(last, total, visible=visible)
    return Positions(last, total, rope.rows, rope.tables, rope.switch, visible)


def _lengths(emit: GraphBuilder, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    import onnx_ir as ir

    base, int32 = "/model/attn_mask_reformat", {"to": int(ir.DataType.INT32)}
    summed = emit.op("ReduceSum", f"{base}/ReduceSum", [mask, emit.int64("mask_axis", [1])], {"keepdims": 0})
    last = emit.op("Sub", f"{base}/Sub", [summed, emit.int64("one", [1])])
    shape = emit.op("Shape", f"{base}/Shape", [mask])
    total = emit.op("Gather", f"{base}/Gather", [shape, emit.int64("length_axis", 1)], {"axis": 0})
    return emit.op("Cast", f"{base}/Sub/Cast", [last], int32), emit.op("Cast", f"{base}/Gather/Cast", [total], int32)
