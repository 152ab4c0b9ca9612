"""One block of columns, many rows: which scale, zero point and codes lose least.

The loss is the sum over columns j of D_j (t_j - q_j)^2 with t_j = w_j + what the errors before j pass on, see
`quantize/gptq.py`. Arrays are [columns, rows], so that what is done to a column is done to all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.half_scales import settled
from edgephi.quantize.lpbq import LARGEST_SCALE

Floats = NDArray[np.float32]

# an asymmetric scale divides the block's range into this many steps; codes reach 15, the rest is clipped
STEPS = (13.0, 14.0, 14.5, 15.0, 15.5, 16.0, 17.0, 18.5)
# a symmetric one puts the weight of largest magnitude at minus this code
DIVISORS = (6.5, 7.0, 7.5, 8.0, 8.5, 9.0, 10.0)
# reproduces an asymmetric weight that lies on a symmetric grid
EXACT_DIVISOR = (8.0,)

TOGETHER = 16
"""Columns whose errors reach each other one by one; those after them get the sum, by a matrix product."""

COLUMNS_TOGETHER = 128
"""Columns of several blocks that get what the errors of all others pass on in one product."""


def blocks_together(block_size: int) -> int:
    """Blocks in `COLUMNS_TOGETHER`, at least one."""
    return max(1, COLUMNS_TOGETHER // block_size)


@dataclass
class Grid:
    """The values a block can take: scale times an integer from `low` to `low` plus the span; [rows] each.

    `low` is the smallest stored code minus the zero point, that is minus the zero point.
    """

    scale: Floats
    low: Floats
    unit: Floats | None = None
    """Where it is given, a scale is 1 to 16 times this, see `quantize/lpbq.py`; positive."""
    half: bool = False
    """Scales will be stored in float16."""

    def allowed(self, scale: Floats) -> Floats:
        """The scale of this grid that is nearest. The loss of given codes is a parabola in the scale, so of the scales
        that can be had the one next to its minimum is the best."""
        if self.unit is not None:
            return nearest_multiple(scale, self.unit)
        return settled(scale) if self.half else scale


@dataclass(frozen=True)
class BlockLoss:
    """What an error of the block costs: D [columns], and U [columns, columns], strictly upper triangular."""

    variance: Floats
    upper: Floats


def search_grid(
    target: Floats, loss: BlockLoss, fmt: BlockFormat, unit: Floats | None = None, *, half: bool = False
) -> Grid:
    """The candidate that loses least when every target is rounded by itself; rows are worked on independently."""
    scales, lows = _candidates(target, fmt)
    if unit is not None:
        scales = nearest_multiple(np.abs(scales), unit)
    elif half:
        scales = settled(scales)
    span = np.float32(fmt.largest_code)
    best: Floats | None = None
    grid = Grid(scales[0], lows[0], unit, half)
    work = np.empty_like(target)
    for scale, low in zip(scales, lows, strict=True):
        np.multiply(target, _inverse(scale), out=work)
        np.rint(work, out=work)
        np.maximum(work, low, out=work)
        np.minimum(work, low + span, out=work)
        work *= scale
        work -= target
        np.square(work, out=work)
        total = loss.variance @ work
        if best is None:
            best, grid = total, Grid(scale.copy(), low.copy(), unit, half)
        else:
            better = total < best
            for kept, new in ((best, total), (grid.scale, scale), (grid.low, low)):
                np.copyto(kept, new, where=better)
    return grid


def _candidates(target: Floats, fmt: BlockFormat) -> tuple[Floats, Floats]:
    """Scales and low codes, [candidates, rows]."""
    span, middle = np.float32(fmt.largest_code), np.float32(-fmt.default_zero_point)
    low_end, high_end = np.minimum(target.min(axis=0), 0), np.maximum(target.max(axis=0), 0)
    extreme = np.where(high_end > -low_end, high_end, low_end)
    divisors = np.array(DIVISORS if fmt.symmetric else EXACT_DIVISOR, np.float32)[:, None]
    scales = -extreme / divisors
    lows = np.full_like(scales, middle)
    if fmt.symmetric:
        return scales, lows
    lows = np.where(scales < 0, -(lows + span), lows)  # -s with codes -8..7 is s with codes -7..8
    steps = np.array(STEPS, np.float32)[:, None]
    wide = (high_end - low_end) / steps
    ideal = np.divide(low_end, wide, out=np.zeros_like(wide), where=wide != 0) + (steps - span) / 2
    wide_lows = np.clip(np.rint(ideal), -span, 0)
    return np.concatenate([np.abs(scales), wide]), np.concatenate([lows, wide_lows]).astype(np.float32)


def fit_block(original: Floats, target: Floats, loss: BlockLoss, grid: Grid, span: np.float32) -> Floats:
    """Codes minus zero point [columns, rows]; `grid` gets the scales that suit them best.

    Codes are found twice, for the scale that is given and for the one that suits the first codes, which may lead to
    other codes; the better stay.
    """
    first, codes = round_in_turn(original, target, loss, grid, span)
    refit = Grid(grid.allowed(best_scale(original, target, loss, grid.scale, codes)), grid.low)
    second, other_codes = round_in_turn(original, target, loss, refit, span)
    better = second < first
    np.copyto(codes, other_codes, where=better)
    np.copyto(grid.scale, refit.scale, where=better)
    grid.scale = grid.allowed(best_scale(original, target, loss, grid.scale, codes))
    return codes


def round_in_turn(
    original: Floats, target: Floats, loss: BlockLoss, grid: Grid, span: np.float32
) -> tuple[Floats, Floats]:
    """Loss [rows] and codes minus zero point [columns, rows], every column's error passed on to those after it."""
    inverse, high = _inverse(grid.scale), grid.low + span
    feed = np.ascontiguousarray(loss.upper.T)
    moved = target.copy()
    codes, errors = np.empty_like(target), np.empty_like(target)
    total = np.zeros(target.shape[1], np.float32)
    work = np.empty_like(total)
    for start in range(0, len(target), TOGETHER):
        stop = min(start + TOGETHER, len(target))
        for j in range(start, stop):
            aim = moved[j]
            if j > start:
                aim += feed[j, start:j] @ errors[start:j]
            code = codes[j]
            np.multiply(aim, inverse, out=code)
            np.rint(code, out=code)
            np.maximum(code, grid.low, out=code)
            np.minimum(code, high, out=code)
            np.multiply(code, grid.scale, out=work)
            np.subtract(original[j], work, out=errors[j])
            np.subtract(aim, work, out=work)
            np.square(work, out=work)
            work *= loss.variance[j]
            total += work
        if stop < len(target):
            moved[stop:] += feed[stop:, start:stop] @ errors[start:stop]
    return total, codes


def best_scale(original: Floats, target: Floats, loss: BlockLoss, scale: Floats, codes: Floats) -> Floats:
    """The scale [rows] that makes the loss of these codes smallest: least squares on what `scale` leaves."""
    feed = np.ascontiguousarray(loss.upper.T)
    passed = codes + feed @ codes
    rest = original - codes * scale
    left = (target - original) + rest + feed @ rest
    weighted = passed * loss.variance[:, None]
    gain, square = np.einsum("ij,ij->j", left, weighted), np.einsum("ij,ij->j", passed, weighted)
    step = np.divide(gain, square, out=np.zeros_like(gain), where=square > 0)
    return np.asarray(scale + step, np.float32)


def nearest_multiple(scale: Floats, unit: Floats) -> Floats:
    """Of 1 to 16 times `unit`."""
    multiple = np.clip(np.rint(scale / unit), 1, LARGEST_SCALE)
    return np.asarray(multiple * unit, np.float32)


def _inverse(scale: Floats) -> Floats:
    """0 where a block of zeros has scale 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
