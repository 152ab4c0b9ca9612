"""Weights as the decoder uses them: read from the checkpoint, then multiplied with what is folded into them.

Everything that turns a `Weight` into float32 values goes through here, so rounding, calibration, float graphs and the
streamed float model all see the same ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgephi.export.checkpoint.tensors import read_alternating, read_vector, require_finite, weight_slices
from edgephi.export.spec import (
    AddedProduct,
    Diagonal,
    Fold,
    Ones,
    RotatedColumns,
    RotatedRows,
    Rotation,
    ScaledColumns,
    TensorRef,
    Weight,
)
from edgephi.quantize.hadamard import random_rotation, rotate

Float32 = NDArray[np.float32]

VALUES_AT_ONCE = 1 << 21
"""Read or rotated together: 8 MB."""


def mixes_rows(weight: Weight) -> bool:
    """Whether a row depends on other rows of the checkpoint, so that the weight has to be read as a whole."""
    return any(isinstance(fold, RotatedRows | Diagonal) for fold in weight.folds)


def read_weight(weight: Weight) -> Float32:
    """A whole weight, float32; a matrix whose rows are mixed is in memory once, and some 30 MB beside it.

    Raises:
        WeightError: NaN or infinite values.
        SourceError: the file ends early.
    """
    if weight.role == "vector" or any(isinstance(fold, Diagonal) for fold in weight.folds):
        values = read_vector(weight)
    else:
        values = np.empty(weight.shape, np.float32)
        for row, tensors, start, stop in weight_slices(weight, VALUES_AT_ONCE):
            rows = read_alternating(tensors, start, stop)
            require_finite(rows, tensors[0])
            values[row : row + len(rows)] = rows
    return fold_values(weight, values)


def read_slice(weight: Weight, tensors: tuple[TensorRef, ...], start: int, stop: int) -> Float32:
    """Rows of a matrix whose rows are not mixed, by their place in the tensors; the result is not checked for NaN.

    Raises:
        WeightError: NaN or infinite values in one of several tensors; see `read_alternating`.
        SourceError: the file ends early.
    """
    return fold_values(weight, read_alternating(tensors, start, stop))


def fold_values(weight: Weight, values: Float32) -> Float32:
    """A weight's values as read, folded, and overwritten: all of them, or some rows where `mixes_rows` says no."""
    for fold in weight.folds:
        values = _apply(fold, values)
    return values


def _apply(fold: Fold, values: Float32) -> Float32:
    match fold:
        case ScaledColumns(gain):
            values *= read_weight(gain)
        case RotatedColumns(rotation, centered):
            step = max(1, VALUES_AT_ONCE // values.shape[1])
            for first in range(0, len(values), step):
                piece = values[first : first + step]
                piece[...] = _rotated(piece, rotation, centered)
        case RotatedRows(rotation, start, centered):
            columns = values.reshape(len(values), -1)
            step = max(1, VALUES_AT_ONCE // len(values))
            for first in range(0, columns.shape[1], step):
                piece = columns[start:, first : first + step]
                piece[...] = _rotated(np.ascontiguousarray(piece.T), rotation, centered).T
        case AddedProduct(matrix, vector, factor):
            by = read_weight(vector).astype(np.float64)
            for row, tensors, start, stop in weight_slices(matrix, VALUES_AT_ONCE):
                product = read_alternating(tensors, start, stop) @ by
                values[row : row + len(product)] += (factor * product).astype(np.float32)
        case Ones():
            values[...] = 1
        case Diagonal():
            values = np.diag(values)
    return values


def _rotated(values: Float32, rotation: Rotation, centered: bool) -> Float32:
    if centered:
        values = values - values.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
    return rotate(values, random_rotation(rotation.size, rotation.seed))
