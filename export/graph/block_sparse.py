"""Block-sparse attention as a bias for GroupQueryAttention.

onnxruntime has an operator of its own for it, com.microsoft.SparseAttention; its CPU kernel gives the same values but
computes every score as well, and runs only when the caller's KV cache is one buffer that it writes into. The bias works
with every way to keep the cache. Its price is memory: heads · length · total numbers, as many as the scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.spec import BlockSparse, DecoderSpec

if TYPE_CHECKING:
    import onnx_ir as ir


PREFILL_CHUNK = 512
"""Tokens. A bias for 32 heads takes 0.5 GB then at the end of 8,192 tokens; for all of them at once, 8.6 GB."""


def prefill_chunk(spec: DecoderSpec) -> int | None:
    """How many tokens of a prompt to compute at once; None: all of them."""
    # with two ropes, the first pieces of a long prompt would be taken for a short one
    return PREFILL_CHUNK if spec.block_sparse is not None and spec.long_rope is None else None


def visibility(
    emit: GraphBuilder, sparse: BlockSparse, heads: int, token_ids: ir.Value, last: ir.Value, total: ir.Value
) -> ir.Value:
    """0 where a head looks at a key and the lowest number where it does not, causality left to the operator.

    Args:
        token_ids: int64 [batch, length].
        last: int32 [batch], index of each sequence's last token.
        total: int32 scalar, length of the longest sequence, past included.

    Returns:
        [batch, heads, length, total], or [batch, 1, length, total] when all heads look at the same keys.
    """
    base = "/model/block_sparse"
    query_block, key_block = _blocks(emit, sparse.block_size, base, token_ids, last, total)
    # key_block > query_block - local_blocks: [batch, 1, length, total]
    oldest = emit.op("Sub", f"{base}/local/Sub", [query_block, emit.int64("sparse_local", sparse.local_blocks)])
    local = emit.op("Greater", f"{base}/local/Greater", [key_block, oldest])
    # (key_block + shift + 1) % stride == 0: [shifts, 1, total]
    shifts = emit.int64("sparse_shifts", [shift + 1 for shift in sparse.shifts])
    column = emit.op("Unsqueeze", f"{base}/stride/Unsqueeze", [shifts, emit.int64("sparse_key_axes", [1, 2])])
    shifted = emit.op("Add", f"{base}/stride/Add", [key_block, column])
    rest = emit.op("Mod", f"{base}/stride/Mod", [shifted, emit.int64("sparse_stride", sparse.stride)])
    vertical = emit.op("Equal", f"{base}/stride/Equal", [rest, emit.int64("sparse_zero", 0)])
    seen = emit.op("Or", f"{base}/Or", [local, vertical])
    bias = emit.op("Where", f"{base}/Where", [seen, emit.scalar("zero", 0.0), emit.lowest()])
    if len(sparse.shifts) in (1, heads):
        return bias
    return emit.op("Concat", f"{base}/Concat", [bias] * (heads // len(sparse.shifts)), {"axis": 1})


def _blocks(
    emit: GraphBuilder, size: int, base: str, token_ids: ir.Value, last: ir.Value, total: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Block numbers, int64: of the queries [batch, 1, length, 1], of the keys [total]."""
    import onnx_ir as ir

    wide = {"to": int(ir.DataType.INT64)}
    start, step, block = emit.int64("sparse_start", 0), emit.int64("sparse_step", 1), emit.int64("sparse_block", size)
    keys = emit.op("Cast", f"{base}/total/Cast", [total], wide)
    shape = emit.op("Shape", f"{base}/length/Shape", [token_ids], {"start": 1, "end": 2})
    length = emit.op("Squeeze", f"{base}/length/Squeeze", [shape])
    # a prompt starts at 0, a single token at its sequence's end; more tokens behind a cache come in batches of one
    past = emit.op("Sub", f"{base}/past/Sub", [keys, length])
    first = emit.op("Min", f"{base}/past/Min", [past, emit.op("Cast", f"{base}/last/Cast", [last], wide)])
    row = emit.op("Unsqueeze", f"{base}/past/Unsqueeze", [first, emit.int64("sparse_row_axis", [1])])
    steps = emit.op("Range", f"{base}/queries/Range", [start, length, step])
    query_block = emit.op("Div", f"{base}/queries/Div", [emit.op("Add", f"{base}/queries/Add", [row, steps]), block])
    column = emit.op("Unsqueeze", f"{base}/queries/Unsqueeze", [query_block, emit.int64("sparse_query_axes", [1, 3])])
    positions = emit.op("Range", f"{base}/keys/Range", [start, keys, step])
    return column, emit.op("Div", f"{base}/keys/Div", [positions, block])
