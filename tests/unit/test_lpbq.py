"""int4 weights with scales of two levels: what the codes stand for, and how much is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import QuantizationError, WeightError
from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.layout import StoredMatrix, StoredTensor
from edgephi.export.weights.stored import read_lpbq, write_lpbq
from edgephi.quantize.formats import BlockFormat, dequantize
from edgephi.quantize.gptq import gptq, gptq_lpbq
from edgephi.quantize.lpbq import LpbqFormat, LpbqWeight, quantize_lpbq
from edgephi.quantize.per_channel import quantize_rows
from edgephi.quantize.round_to_nearest import round_to_nearest


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
    packed = quantize_lpbq(weight, LpbqFormat(block_size), name="w")
    assert packed.codes.min() >= -8 and packed.codes.max() <= 7
    assert packed.block_scales.min() >= 1 and packed.block_scales.max() <= 16
    assert (packed.channel_scales > 0).all()
    assert not packed.values()[7].any()


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_two_levels_cost_less_than_a_third_more_than_free_scales(block_size: int) -> None:
    weight = gaussian(64, 512)
    free = dequantize(round_to_nearest(weight, BlockFormat(4, block_size, symmetric=True), name="w"))
    assert error(weight, quantize_lpbq(weight, LpbqFormat(block_size), name="w").values()) < 1.33 * error(weight, free)


def test_a_weight_on_the_grid_comes_back() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(-8, 8, (8, 128)).astype(np.int8)
    codes[:, ::32] = 7
    scales = rng.integers(9, 17, (8, 4)).astype(np.uint8)
    scales[:, 0] = 16
    weight = LpbqWeight(np.maximum(codes, -7), scales, np.full(8, 0.25, np.float32)).values()
    assert np.abs(quantize_lpbq(weight, LpbqFormat(32), name="w").values() - weight).max() < 1e-4


@pytest.mark.parametrize(
    ("value", "kind"), [(np.nan, WeightError), (np.inf, WeightError), (2.0**80, QuantizationError)]
)
def test_what_cannot_be_scaled_is_an_error_that_names_the_weight(value: float, kind: type[Exception]) -> None:
    weight = gaussian(4, 32)
    weight[2, 5] = value
    with pytest.raises(kind) as refused:
        quantize_lpbq(weight, LpbqFormat(32), name="layers.0.o.weight")
    assert "layers.0.o.weight" in str(refused.value)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(QuantizationError, match="not blocks of 32"):
        quantize_lpbq(gaussian(4, 48), LpbqFormat(32), name="w")


def inputs(tokens: int, columns: int) -> NDArray[np.float32]:
    """With a covariance whose spectrum is like 1/k, as that of hidden states."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(columns, columns)))
    strength = 1 / np.sqrt(np.arange(1, columns + 1))
    return np.asarray((rng.normal(size=(tokens, columns)) * strength) @ basis.T, np.float32)


def output_error(seen: NDArray[np.float32], weight: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    return float(np.square(seen.astype(np.float64) @ (weight - values).T.astype(np.float64)).sum())


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_gptq_halves_the_error_of_the_output_and_keeps_to_the_npus_range(block_size: int) -> None:
    weight = gaussian(96, 384) * np.geomspace(1e-3, 1e3, 96, dtype=np.float32)[:, None]
    weight[5] = 0
    weight[9, 0] = 40 * np.abs(weight[9]).max()
    seen = inputs(2048, 384)
    fitted = gptq_lpbq(weight, seen.T @ seen, LpbqFormat(block_size))
    assert fitted.codes.min() >= -8 and fitted.codes.max() <= 7
    assert fitted.block_scales.min() >= 1 and fitted.block_scales.max() <= 16
    assert (fitted.channel_scales > 0).all()
    assert not fitted.values()[5].any()
    rounded = quantize_lpbq(weight, LpbqFormat(block_size), name="w").values()
    # row by row: their magnitudes differ by a million
    for row in (0, 50, 95):
        part = slice(row, row + 1)
        before = output_error(seen, weight[part], rounded[part])
        assert output_error(seen, weight[part], fitted.values()[part]) < 0.6 * before


def test_gptq_with_two_levels_loses_little_to_free_scales() -> None:
    weight, seen = gaussian(96, 384), inputs(2048, 384)
    free = dequantize(gptq(weight, seen.T @ seen, BlockFormat(4, 32, symmetric=True)))
    fitted = gptq_lpbq(weight, seen.T @ seen, LpbqFormat(32)).values()
    assert output_error(seen, weight, fitted) < 1.4 * output_error(seen, weight, free)


def test_gptq_keeps_a_weight_on_the_grid() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(-7, 8, (8, 128)).astype(np.int8)
    codes[:, ::32] = 7
    scales = rng.integers(9, 17, (8, 4)).astype(np.uint8)
    scales[:, 0] = 16
    weight, seen = LpbqWeight(codes, scales, np.full(8, 0.25, np.float32)).values(), inputs(512, 128)
    assert np.abs(gptq_lpbq(weight, seen.T @ seen, LpbqFormat(32)).values() - weight).max() < 1e-3


def test_gptq_refuses_rows_that_are_no_whole_blocks() -> None:
    with pytest.raises(QuantizationError, match="not blocks of 32"):
        gptq_lpbq(gaussian(4, 48), np.eye(48, dtype=np.float32), LpbqFormat(32))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Codes [columns, rows], the first of two in the low nibble, two's complement; block scales [blocks, rows]."""
    packed = quantize_lpbq(gaussian(6, 64), LpbqFormat(32), name="w")
    matrix = StoredMatrix(
        6,
        64,
        BlockFormat(4, 32, symmetric=True),
        StoredTensor("codes", 0, (64, 3), "uint8"),
        StoredTensor("scales", 192, (2, 6), "uint8"),
        channel_scales=StoredTensor("channels", 204, (6,), "float32"),
    )
    data = DataFile(tmp_path / "data")
    write_lpbq(packed, matrix, data)
    found = read_lpbq(data, matrix)
    data.close()
    for ours, theirs in zip(vars(found).values(), vars(packed).values(), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    first = int((tmp_path / "data").read_bytes()[0])
    assert (first & 15, first >> 4) == (packed.codes[0, 0] % 16, packed.codes[1, 0] % 16)
    assert (tmp_path / "data").read_bytes()[192 : 192 + 12] == packed.block_scales.T.tobytes()


def test_eight_bits_have_a_scale_for_every_row_and_err_by_half_of_it() -> None:
    weight = gaussian(6, 40) * np.geomspace(1e-3, 1e3, 6, dtype=np.float32)[:, None]
    weight[2] = 0
    packed = quantize_rows(weight, name="w")
    codes, scales = packed.codes, packed.scales
    assert codes.dtype == np.int8 and np.abs(codes).max(axis=1).tolist() == [127, 127, 0, 127, 127, 127]
    assert (np.abs(codes * scales[:, None] - weight) <= 0.501 * scales[:, None]).all()
    weight[1, 1] = np.nan
    with pytest.raises(WeightError, match="NaN"):
        quantize_rows(weight, name="w")
