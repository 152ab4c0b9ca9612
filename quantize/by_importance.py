"""Rounding in which the error of an input channel counts by what the channel carries.

A linear layer with inputs x errs on average by the sum over pairs of columns i, j of e_i e_j E[x_i x_j], e the error of
a row. Of that, only i = j is kept: a column's squared error counts E[x_j^2]. These means need few tokens, no matrix of
columns by columns and no factorization, and rows can be rounded in any pieces. llama.cpp's importance matrix weighs
errors in the same way.
"""

from __future__ import annotations

import numpy as np

from edgephi.errors import QuantizationError, WeightError
from edgephi.quantize.formats import BlockFormat, QuantizedWeight
from edgephi.quantize.quantizer import Floats, Format, Statistics, StoredWeight
from edgephi.quantize.round_to_nearest import round_to_nearest

UNSEEN = 0.01
"""Added to every column's mean square, as a fraction of the mean of all: a channel that the text left still shall not
count 0."""
LARGEST = 2.0**40
"""What a column may count, beside a mean of 1."""


def round_by_importance(
    weight: Floats,
    mean_squares: Floats,
    fmt: BlockFormat,
    name: str = "weight",
    *,
    half_scales: bool = False,
) -> QuantizedWeight:
    """Quantize a weight to 4 bits, minimizing each block's squared error weighted by the columns' mean squares.

    The search tries more scales and zero points than `round_to_nearest`, and takes about three times as long. A slice
    of a weight's rows gives the same blocks.

    Args:
        weight: float32 [rows, columns].
        mean_squares: of the layer's inputs, float32 [columns], none negative.
        fmt: the format to store, of 4 bits.
        name: the weight's name for error messages.
        half_scales: scales will be stored in float16.

    Raises:
        WeightError: see `round_to_nearest`; also mean squares of another shape, or that are negative or not finite.
        QuantizationError: not 4 bits, or magnitudes beyond 2**125.
    """
    if fmt.bits != 4:
        raise QuantizationError(
            "rounding by importance makes 4-bit weights", where=name, remedy="Round 8-bit weights to nearest"
        )
    if weight.ndim == 2 and mean_squares.shape != weight.shape[1:]:
        raise WeightError(
            f"there are mean squares of {list(mean_squares.shape)} inputs, the weight has {weight.shape[1]} columns",
            where=name,
            remedy="Pass float32 [columns]",
        )
    importance = column_importance(mean_squares, name)
    return round_to_nearest(weight, fmt, name, half_scales=half_scales, importance=importance)


def column_importance(mean_squares: Floats, name: str = "weight") -> Floats:
    """What the squared error of each column counts, float32 [columns], about 1 on average.

    Raises:
        WeightError: a mean square is negative or not finite.
    """
    wide = mean_squares.astype(np.float64)
    if not np.isfinite(wide).all() or (wide < 0).any():
        raise WeightError(
            "mean squares of inputs are negative, NaN or infinite",
            where=name,
            remedy="Check the checkpoint, or calibrate with other text",
        )
    mean = float(wide.mean())
    if not mean:  # a layer that never gets anything: all columns alike
        return np.ones(len(wide), np.float32)
    return np.minimum(wide / mean + UNSEEN, LARGEST).astype(np.float32)


class _ByImportance:
    """Rounding by importance as a quantizer: 4 bits, and the inputs' mean squares."""

    name = "weighted"
    title = "rounded by importance"
    needs_inputs = False
    needs_importance = True

    def writes(self, fmt: Format) -> bool:
        return isinstance(fmt, BlockFormat) and fmt.bits == 4

    def describe(self, fmt: Format) -> str:
        return "round to nearest, errors weighted by the inputs' mean squares"

    def quantize(
        self, weight: Floats, fmt: Format, statistics: Statistics | None, *, name: str, half_scales: bool
    ) -> StoredWeight:
        if statistics is None or statistics.mean_squares is None:
            raise QuantizationError(
                "rounding by importance needs the mean squares of a layer's inputs",
                where=name,
                remedy="Pass statistics of calibration text",
            )
        if not isinstance(fmt, BlockFormat):
            raise QuantizationError(
                "rounding by importance makes 4-bit blocks", where=name, remedy="Choose another quantizer"
            )
        return round_by_importance(weight, statistics.mean_squares, fmt, name, half_scales=half_scales)


BY_IMPORTANCE = _ByImportance()
