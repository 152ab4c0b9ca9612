"""What a quantizer gives, written to its place in the data file and read back.

Blocks lie as MatMulNBits takes them, row by row. int4 codes with scales of two levels, and int8 codes with a scale a
row, lie as ONNX's own MatMul takes them, [columns, rows].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgephi.export.spec import TensorRef
from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.half_range import require_half_scales, to_half
from edgephi.export.weights.layout import StoredMatrix
from edgephi.quantize.formats import QuantizedWeight, pack_nibbles, unpack_nibbles
from edgephi.quantize.lpbq import LpbqWeight
from edgephi.quantize.per_channel import ChannelWeight
from edgephi.quantize.quantizer import StoredWeight


def write_stored(
    packed: StoredWeight, matrix: StoredMatrix, row: int, data: DataFile, tensor: TensorRef, half: str | None = None
) -> None:
    """Write a weight, or in blocks some rows of it, the first of them row `row`; `tensor` is where they came from.

    Args:
        half: see `Layout.half`.

    Raises:
        WeightError: values that float16 cannot hold, where it has to.
        OutputError: the disk is full.
    """
    if isinstance(packed, LpbqWeight):
        write_lpbq(packed, matrix, data)
    elif isinstance(packed, ChannelWeight):
        assert matrix.channel_scales is not None
        data.write(matrix.codes, 0, np.ascontiguousarray(packed.codes.T))
        data.write(matrix.channel_scales, 0, packed.scales)
    else:
        _write_blocks(packed, matrix, row, data, tensor, half)


def read_values(data: DataFile, matrix: StoredMatrix) -> NDArray[np.float32]:
    """What the written codes of a matrix decode to, float32 [rows, columns]."""
    if matrix.channel_scales is not None:
        return read_lpbq(data, matrix).values()
    assert matrix.format is not None and matrix.scales is not None
    zero_points = data.read(matrix.zero_points) if matrix.zero_points is not None else None
    stored = QuantizedWeight(
        matrix.format,
        matrix.columns,
        data.read(matrix.codes).astype(np.uint8, copy=False),
        data.read(matrix.scales).astype(np.float32, copy=False),
        None if zero_points is None else zero_points.astype(np.uint8, copy=False),
    )
    return matrix.after_rounding(stored.values())


def read_lpbq(data: DataFile, matrix: StoredMatrix) -> LpbqWeight:
    """Codes and scales of two levels as they were written."""
    assert matrix.scales is not None and matrix.channel_scales is not None
    nibbles = unpack_nibbles(data.read(matrix.codes).astype(np.uint8, copy=False), matrix.rows)
    codes = ((nibbles ^ np.uint8(8)).astype(np.int8) - np.int8(8)).T
    scales = data.read(matrix.scales).astype(np.uint8, copy=False).T
    return LpbqWeight(codes, scales, data.read(matrix.channel_scales).astype(np.float32, copy=False))


def write_lpbq(packed: LpbqWeight, matrix: StoredMatrix, data: DataFile) -> None:
    """A whole weight with scales of two levels; raises OutputError when the disk is full."""
    assert matrix.scales is not None and matrix.channel_scales is not None
    # two's complement in a nibble
    nibbles = packed.codes.T.view(np.uint8) & np.uint8(15)
    data.write(matrix.codes, 0, pack_nibbles(nibbles))
    data.write(matrix.scales, 0, np.ascontiguousarray(packed.block_scales.T))
    data.write(matrix.channel_scales, 0, packed.channel_scales)


def _write_blocks(
    packed: QuantizedWeight, matrix: StoredMatrix, row: int, data: DataFile, tensor: TensorRef, half: str | None
) -> None:
    data.write(matrix.codes, row, packed.codes)
    if matrix.scales is not None:
        if half is not None:
            require_half_scales(packed.scales, matrix, tensor, half)
        data.write(matrix.scales, row, to_half(packed.scales, matrix.scales.dtype, tensor))
    if matrix.zero_points is not None and packed.zero_points is not None:
        data.write(matrix.zero_points, row, packed.zero_points)
