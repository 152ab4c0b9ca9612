"""Dot products in an order that no processor changes, and weights that depend on no other sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.quantize.formats import BLOCK_SIZES, BlockFormat
from edgephi.quantize.lpbq import LpbqFormat, quantize_lpbq
from edgephi.quantize.round_to_nearest import round_to_nearest
from edgephi.quantize.sums import PARTS, column_dots

Floats = NDArray[np.float32]


def in_order(a: Floats, b: Floats) -> np.float32:
    """The same one number at a time, each product and each sum rounded to float32."""
    quarter = len(a) // PARTS
    sums = []
    for row in range(quarter):
        total = np.float32(a[row] * b[row])
        for place in range(row + quarter, len(a), quarter):
            total = np.float32(total + np.float32(a[place] * b[place]))
        sums.append(total)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [np.float32(low + high) for low, high in zip(sums[:half], sums[half:], strict=True)]
    return np.float32(sums[0])


@pytest.mark.parametrize("rows", BLOCK_SIZES)
@pytest.mark.parametrize("columns", [1, 2, 37])
def test_every_product_and_sum_is_rounded_in_a_known_order(rows: int, columns: int) -> None:
    a, b = np.random.default_rng(rows).standard_normal((2, rows, columns), np.float32)
    expected = [in_order(a[:, column], b[:, column]) for column in range(columns)]
    np.testing.assert_array_equal(column_dots(a, b), np.array(expected, np.float32))
    work = np.empty((rows // 2, columns), np.float32)
    np.testing.assert_array_equal(column_dots(a, b, work), np.array(expected, np.float32))


def test_instructions_that_round_once_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """What np.einsum does on Arm: here its products and sums are not rounded at all before the end."""
    weight = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    weight[3], weight[4, ::2] = 0.0, -0.0
    formats = [BlockFormat(bits, size, symmetric) for bits, size, symmetric in ((4, 32, False), (4, 128, True))]
    formats += [BlockFormat(8, 32, symmetric=False), BlockFormat(8, 128, symmetric=True)]

    def quantized() -> list[bytes]:
        found = []
        for fmt in formats:
            stored = round_to_nearest(weight, fmt, half_scales=True)
            found += [stored.codes.tobytes(), stored.scales.tobytes()]
        pair = quantize_lpbq(weight, LpbqFormat(32), name="w")
        return [*found, pair.codes.tobytes(), pair.block_scales.tobytes(), pair.channel_scales.tobytes()]

    before, exact = quantized(), np.einsum

    def unrounded(form: str, *factors: Floats) -> Any:
        return exact(form, *(factor.astype(np.float64) for factor in factors)).astype(np.float32)

    monkeypatch.setattr(np, "einsum", unrounded)
    assert quantized() == before


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_of_zeros_of_either_sign_has_one_scale(symmetric: bool) -> None:
    """Which of 0 and -0 is the smaller, processors do not agree on."""
    zeros = np.zeros((1, 32), np.float32)
    for sign in (zeros, -zeros, np.where(np.arange(32) % 2, zeros, -zeros)):
        scales = round_to_nearest(sign, BlockFormat(4, 32, symmetric)).scales
        assert scales.tobytes() == zeros[:, :1].tobytes()
