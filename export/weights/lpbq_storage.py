"""int4 weights with scales of two levels in the data file: codes as ONNX's int4 MatMul takes them, [columns, rows]."""

from __future__ import annotations

import numpy as np

from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.layout import StoredMatrix
from edgephi.quantize.formats import pack_nibbles, unpack_nibbles
from edgephi.quantize.lpbq import LpbqWeight


def write_lpbq(packed: LpbqWeight, matrix: StoredMatrix, data: DataFile) -> None:
    """Write a whole weight to its place.

    Raises:
        OutputError: the disk is full.
    """
    assert matrix.scales is not None and matrix.channel_scales is not None
    # two's complement in a nibble
    nibbles = packed.codes.T.view(np.uint8) & np.uint8(15)
    data.write(matrix.codes, 0, pack_nibbles(nibbles))
    data.write(matrix.scales, 0, np.ascontiguousarray(packed.block_scales.T))
    data.write(matrix.channel_scales, 0, packed.channel_scales)


def read_lpbq(data: DataFile, matrix: StoredMatrix) -> LpbqWeight:
    """What was written."""
    assert matrix.scales is not None and matrix.channel_scales is not None
    nibbles = unpack_nibbles(data.read(matrix.codes).astype(np.uint8, copy=False), matrix.rows)
    codes = ((nibbles ^ np.uint8(8)).astype(np.int8) - np.int8(8)).T
    scales = data.read(matrix.scales).astype(np.uint8, copy=False).T
    return LpbqWeight(codes, scales, data.read(matrix.channel_scales).astype(np.float32, copy=False))
