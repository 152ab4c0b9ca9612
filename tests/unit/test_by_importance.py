"""Rounding by importance against its loss in float64, and against trying every scale and zero point."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import QuantizationError, WeightError
from edgephi.quantize.by_importance import BY_IMPORTANCE, UNSEEN, round_by_importance
from edgephi.quantize.formats import BlockFormat, QuantizedWeight
from edgephi.quantize.quantizer import Statistics
from edgephi.quantize.round_to_nearest import round_to_nearest

Floats = NDArray[np.float32]
BLOCKS = [BlockFormat(4, size, symmetric) for size in (16, 32, 128) for symmetric in (False, True)]


def weight_and_squares(columns: int = 256, rows: int = 48, seed: int = 3) -> tuple[Floats, Floats]:
    """Heavy-tailed weights, and inputs that differ by a factor of some hundred."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(4, (rows, columns)) * np.exp(rng.normal(0, 0.3, columns)) * 0.03).astype(np.float32)
    return weight, np.exp(rng.normal(0, 2, columns)).astype(np.float32)


def losses(weight: Floats, packed: QuantizedWeight, squares: Floats) -> NDArray[np.float64]:
    """Weighted squared error of every block, [rows, blocks], by the definition."""
    counts = squares.astype(np.float64) / squares.mean(dtype=np.float64) + UNSEEN
    errors = (packed.values().astype(np.float64) - weight) ** 2 * counts
    size = packed.format.block_size
    padded = np.pad(errors, ((0, 0), (0, -weight.shape[1] % size)))
    total: NDArray[np.float64] = padded.reshape(len(weight), -1, size).sum(axis=2)
    return total


@pytest.mark.parametrize("fmt", BLOCKS, ids=str)
@pytest.mark.parametrize("columns", [256, 250])
def test_no_block_loses_more_than_rounded_to_nearest(fmt: BlockFormat, columns: int) -> None:
    weight, squares = weight_and_squares(columns)
    ours = losses(weight, round_by_importance(weight, squares, fmt), squares)
    nearest = losses(weight, round_to_nearest(weight, fmt), squares)
    assert (ours <= nearest * (1 + 1e-4)).all()
    assert ours.sum() < (0.97 if fmt.symmetric else 0.85) * nearest.sum()


def test_it_comes_near_the_best_of_all_scales_and_zero_points() -> None:
    weight, squares = weight_and_squares(64, rows=8)
    fmt = BlockFormat(4, 32, symmetric=False)
    found = losses(weight, round_by_importance(weight, squares, fmt), squares)
    counts = (squares.astype(np.float64) / squares.mean(dtype=np.float64) + UNSEEN).reshape(-1, 32)
    blocks = weight.astype(np.float64).reshape(8, -1, 32)
    best = np.full(blocks.shape[:2], np.inf)
    spread = np.maximum(blocks.max(axis=2), 0) - np.minimum(blocks.min(axis=2), 0)
    for steps in np.linspace(9, 24, 121):
        scale = (spread / steps)[..., None]
        for zero_point in range(16):
            codes = np.clip(np.rint(blocks / scale), -zero_point, 15 - zero_point)
            products = (counts * codes * blocks).sum(axis=2), (counts * codes**2).sum(axis=2)
            fit = (products[0] / np.maximum(products[1], 1e-30))[..., None]
            best = np.minimum(best, (counts * (blocks - fit * codes) ** 2).sum(axis=2))
    assert (found >= best * 0.98).all()  # the search above is a grid: what lies between is a little better
    assert found.sum() < 1.2 * best.sum()


def test_equal_importance_is_at_least_as_good_as_rounding() -> None:
    weight, _ = weight_and_squares()
    ones, fmt = np.ones(256, np.float32), BlockFormat(4, 32, symmetric=False)
    ours = losses(weight, round_by_importance(weight, ones, fmt), ones)
    assert ours.sum() <= losses(weight, round_to_nearest(weight, fmt), ones).sum()


def test_slices_of_rows_give_the_same_blocks() -> None:
    weight, squares = weight_and_squares(192, rows=40)
    fmt = BlockFormat(4, 32, symmetric=False)
    whole = round_by_importance(weight, squares, fmt)
    for start in range(0, 40, 7):
        part = round_by_importance(weight[start : start + 7], squares, fmt)
        assert np.array_equal(part.codes, whole.codes[start : start + 7])
        assert np.array_equal(part.scales, whole.scales[start : start + 7])


def test_a_channel_without_input_still_counts_and_none_at_all_is_rounding() -> None:
    weight, squares = weight_and_squares(64)
    fmt = BlockFormat(4, 32, symmetric=False)
    squares[:8] = 0
    assert np.abs(round_by_importance(weight, squares, fmt).values() - weight).max() < np.abs(weight).max()
    silent = round_by_importance(weight, np.zeros(64, np.float32), fmt)
    assert np.array_equal(silent.codes, round_by_importance(weight, np.ones(64, np.float32), fmt).codes)


def test_what_it_cannot_use_is_refused() -> None:
    weight, squares = weight_and_squares(64)
    four, eight = BlockFormat(4, 32, symmetric=False), BlockFormat(8, 32, symmetric=True)
    for wrong, what in ((squares[:32], r"of \[32\] inputs"), (-squares, "negative"), (squares * np.nan, "NaN")):
        with pytest.raises(WeightError, match=what):
            round_by_importance(weight, wrong, four, "some.weight")
    with pytest.raises(QuantizationError, match="4-bit"):
        round_by_importance(weight, squares, eight)
    for statistics in (None, Statistics(hessian=np.eye(64, dtype=np.float32))):
        with pytest.raises(QuantizationError, match="needs the mean squares"):
            BY_IMPORTANCE.quantize(weight, four, statistics, name="some.weight", half_scales=True)
    assert BY_IMPORTANCE.writes(four) and not BY_IMPORTANCE.writes(eight)
