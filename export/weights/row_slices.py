"""Consecutive rows of a stored matrix: a part of the same bytes, for graphs that take a packed projection apart.

Rows share no bytes: codes, scales and zero points of each begin at one of their own (ContribOperators.md).
"""

from __future__ import annotations

from dataclasses import replace

from edgephi.export.weights.layout import StoredMatrix, StoredTensor


def tensor_rows(tensor: StoredTensor, start: int, stop: int, renamed: tuple[str, str]) -> StoredTensor:
    """Rows `start` to `stop` of a tensor, under its name with `renamed[0]` replaced by `renamed[1]`."""
    row = tensor.bytes // tensor.shape[0]
    shape = (stop - start, *tensor.shape[1:])
    return replace(tensor, name=tensor.name.replace(*renamed), offset=tensor.offset + start * row, shape=shape)


def matrix_rows(matrix: StoredMatrix, start: int, stop: int, renamed: tuple[str, str]) -> StoredMatrix:
    """Rows `start` to `stop` of a matrix."""

    def part(tensor: StoredTensor | None) -> StoredTensor | None:
        return tensor and tensor_rows(tensor, start, stop, renamed)

    return replace(
        matrix,
        rows=stop - start,
        codes=tensor_rows(matrix.codes, start, stop, renamed),
        scales=part(matrix.scales),
        zero_points=part(matrix.zero_points),
    )
