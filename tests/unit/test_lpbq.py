"""int4 weights with scales of two levels: what the codes stand for, and how much is lost."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import QuantizationError, WeightError
from edgephi.quantize import BlockFormat, dequantize, round_to_nearest
from edgephi.quantize.lpbq import LpbqWeight, quantize_lpbq
from edgephi.quantize.per_channel import quantize_rows


def gaussian(rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((rows, columns)).astype(np.float32)


def error(weight: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    return float(((weight - values) ** 2).mean() / (weight**2).mean())


def test_an_element_is_code_times_block_scale_times_channel_scale() -> None:
    codes = np.array([[1, -8, 7, 0], [2, 3, -1, 5]], np.int8).repeat(8, axis=1)
    scales = np.array([[1, 16], [3, 5]], np.uint8)
    values = LpbqWeight(codes, scales, np.array([0.5, 2.0], np.float32)).values()
    assert values.shape == codes.shape
    assert values[0, 0] == 0.5 and values[0, 8] == -4.0 and values[0, 16] == 7 * 16 * 0.5
    assert values[1, 8] == 3 * 3 * 2.0 and values[1, 31] == 5 * 5 * 2.0


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_codes_and_scales_are_in_the_npus_range(block_size: int) -> None:
    weight = gaussian(40, 256) * np.geomspace(1e-3, 1e3, 40, dtype=np.float32)[:, None]
    weight[7] = 0
    packed = quantize_lpbq(weight, block_size, name="w")
    assert packed.codes.min() >= -8 and packed.codes.max() <= 7
    assert packed.block_scales.min() >= 1 and packed.block_scales.max() <= 16
    assert (packed.channel_scales > 0).all()
    assert not packed.values()[7].any()


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_two_levels_cost_less_than_a_third_more_than_free_scales(block_size: int) -> None:
    weight = gaussian(64, 512)
    free = dequantize(round_to_nearest(weight, BlockFormat(4, block_size, symmetric=True), name="w"))
    assert error(weight, quantize_lpbq(weight, block_size, name="w").values()) < 1.33 * error(weight, free)


def test_a_weight_on_the_grid_comes_back() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(-8, 8, (8, 128)).astype(np.int8)
    codes[:, ::32] = 7
    scales = rng.integers(9, 17, (8, 4)).astype(np.uint8)
    scales[:, 0] = 16
    weight = LpbqWeight(np.maximum(codes, -7), scales, np.full(8, 0.25, np.float32)).values()
    assert np.abs(quantize_lpbq(weight, 32, name="w").values() - weight).max() < 1e-4


@pytest.mark.parametrize(
    ("value", "kind"), [(np.nan, WeightError), (np.inf, WeightError), (2.0**80, QuantizationError)]
)
def test_what_cannot_be_scaled_is_an_error_that_names_the_weight(value: float, kind: type[Exception]) -> None:
    weight = gaussian(4, 32)
    weight[2, 5] = value
    with pytest.raises(kind) as refused:
        quantize_lpbq(weight, 32, name="layers.0.o.weight")
    assert "layers.0.o.weight" in str(refused.value)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(QuantizationError, match="not blocks of 32"):
        quantize_lpbq(gaussian(4, 48), 32, name="w")


def test_eight_bits_have_a_scale_for_every_row_and_err_by_half_of_it() -> None:
    weight = gaussian(6, 40) * np.geomspace(1e-3, 1e3, 6, dtype=np.float32)[:, None]
    weight[2] = 0
    codes, scales = quantize_rows(weight, name="w")
    assert codes.dtype == np.int8 and np.abs(codes).max(axis=1).tolist() == [127, 127, 0, 127, 127, 127]
    assert (np.abs(codes * scales[:, None] - weight) <= 0.501 * scales[:, None]).all()
    weight[1, 1] = np.nan
    with pytest.raises(WeightError, match="NaN"):
        quantize_rows(weight, name="w")
