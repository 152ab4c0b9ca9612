"""GPTQ against the paper's own recursion, against rounding, and at the edges of its input."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import QuantizationError, WeightError
from edgephi.quantize.formats import BlockFormat, dequantize, unpack_nibbles
from edgephi.quantize.gptaq import compensate
from edgephi.quantize.gptq import gptq
from edgephi.quantize.round_to_nearest import round_to_nearest

Floats = NDArray[np.float32]
FORMATS = [BlockFormat(4, size, symmetric) for size in (32, 64, 128) for symmetric in (True, False)]
ASYMMETRIC = BlockFormat(4, 32, symmetric=False)


def correlated_inputs(tokens: int, columns: int, seed: int = 0) -> Floats:
    """Inputs whose covariance has a spectrum like 1/k, as hidden states of a transformer do."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(columns, columns)))
    strength = 1 / np.sqrt(np.arange(1, columns + 1))
    return np.asarray((rng.normal(size=(tokens, columns)) * strength) @ basis.T, np.float32)


def gaussian(rows: int, columns: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, columns)).astype(np.float32)


def output_error(inputs: Floats, weight: Floats, decoded: Floats) -> float:
    """||X (W - Q)^T||^2 in float64."""
    difference = weight.astype(np.float64) - decoded
    return float(((inputs.astype(np.float64) @ difference.T) ** 2).sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [384, 330])
def test_correlated_inputs_err_less_than_half_as_much_as_under_rounding(fmt: BlockFormat, columns: int) -> None:
    inputs, weight = correlated_inputs(2048, columns), gaussian(96, columns)
    fitted = dequantize(gptq(weight, inputs.T @ inputs, fmt))
    rounded = dequantize(round_to_nearest(weight, fmt))
    assert fitted.shape == weight.shape
    assert output_error(inputs, weight, fitted) < 0.5 * output_error(inputs, weight, rounded)


def paper_gptq(weight: Floats, hessian: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Algorithm 1 of Frantar et al. 2022 for symmetric codes -8..7 and given scales [rows]: column by column, left to
    right, with the upper Cholesky factor of the inverse Hessian."""
    left = weight.astype(np.float64).copy()
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    codes = np.zeros_like(left)
    for j in range(left.shape[1]):
        codes[:, j] = np.clip(np.rint(left[:, j] / scale), -8, 7)
        error = (left[:, j] - codes[:, j] * scale) / factor[j, j]
        left[:, j:] -= np.outer(error, factor[j, j:])
    return codes


def test_codes_are_those_of_the_papers_recursion() -> None:
    # one block, columns already in order of their diagonal, and the scale that was found: the recursion is what is left
    inputs, weight = correlated_inputs(512, 32), gaussian(64, 32)
    inputs = inputs[:, np.argsort(-np.square(inputs).sum(axis=0))]
    hessian = inputs.T.astype(np.float64) @ inputs
    fmt = BlockFormat(4, 32, symmetric=True)
    # with a scale that least squares does not move, found codes and recursion agree
    result = gptq(weight, hessian, fmt)
    codes = unpack_nibbles(result.codes, 32)[:, 0].astype(np.int64) - 8
    damped = hessian + 0.01 * np.trace(hessian) / 32 * np.eye(32)
    expected = paper_gptq(weight, damped, result.scales[:, 0].astype(np.float64))
    # the last step refits the scale and keeps the codes, so a few codes sit across a rounding border of the new scale
    assert np.mean(codes == expected) > 0.9

    def loss(quantized: NDArray[np.float64]) -> NDArray[np.float64]:
        difference = weight - quantized * result.scales
        return np.einsum("ij,jk,ik->i", difference, damped, difference)

    assert loss(codes.astype(np.float64)).sum() <= loss(expected).sum()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_weight_on_the_grid_comes_back(fmt: BlockFormat) -> None:
    rng = np.random.default_rng(3)
    blocks = 256 // fmt.block_size
    codes = rng.integers(-8, 8, (16, blocks, fmt.block_size))
    codes[:, :, 0] = -8
    scales = rng.uniform(0.01, 0.02, (16, blocks, 1)).astype(np.float32)
    weight = np.asarray(codes * scales, np.float32).reshape(16, 256)
    inputs = correlated_inputs(512, 256)
    decoded = dequantize(gptq(weight, inputs.T @ inputs, fmt))
    np.testing.assert_allclose(decoded, weight, rtol=0, atol=1e-6 * float(np.abs(weight).max()))


def test_uncorrelated_inputs_leave_nothing_to_gain_but_the_scales() -> None:
    weight, fmt = gaussian(64, 128), ASYMMETRIC
    fitted = dequantize(gptq(weight, np.eye(128, dtype=np.float32), fmt))
    rounded = dequantize(round_to_nearest(weight, fmt))
    identity = np.eye(128, dtype=np.float32)
    ratio = output_error(identity, weight, fitted) / output_error(identity, weight, rounded)
    assert 0.9 < ratio < 1.05


@pytest.mark.parametrize("fmt", [ASYMMETRIC, BlockFormat(4, 32, symmetric=True)], ids=str)
def test_columns_without_input_are_rounded_and_cost_the_others_nothing(fmt: BlockFormat) -> None:
    inputs, weight = correlated_inputs(512, 128), gaussian(32, 128)
    inputs[:, 40:100] = 0
    decoded = dequantize(gptq(weight, inputs.T @ inputs, fmt))
    step = np.abs(weight).max() / 7
    assert np.abs(decoded - weight)[:, 64:96].max() < step, "a block nobody looks at is still near its weights"
    rounded = dequantize(round_to_nearest(weight, fmt))
    assert output_error(inputs, weight, decoded) < 0.6 * output_error(inputs, weight, rounded)


def test_no_inputs_at_all_is_rounding() -> None:
    weight = gaussian(32, 96)
    decoded = dequantize(gptq(weight, np.zeros((96, 96), np.float32), ASYMMETRIC))
    rounded = dequantize(round_to_nearest(weight, ASYMMETRIC))
    assert np.square(decoded - weight).sum() < 1.05 * np.square(rounded - weight).sum()


def test_blocks_of_zeros_decode_to_zeros() -> None:
    weight = gaussian(8, 96)
    weight[:, 32:64] = 0
    inputs = np.zeros((256, 96), np.float32)
    inputs[:, 32:64] = correlated_inputs(256, 32)
    inputs[:, :32] = correlated_inputs(256, 32, seed=5)
    decoded = dequantize(gptq(weight, inputs.T @ inputs, ASYMMETRIC))
    assert not decoded[:, 32:64].any()


def test_rows_do_not_depend_on_each_other() -> None:
    inputs, weight = correlated_inputs(512, 96), gaussian(1100, 96)
    hessian = inputs.T @ inputs
    whole = dequantize(gptq(weight, hessian, ASYMMETRIC))
    np.testing.assert_allclose(dequantize(gptq(weight[1000:], hessian, ASYMMETRIC)), whole[1000:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    weight, hessian = gaussian(8, 64), np.eye(64, dtype=np.float32)
    for values, named in ((weight, "weight"), (hessian, "Hessian")):
        before = values[3, 5]
        values[3, 5] = bad
        with pytest.raises(WeightError, match=f"the {named} holds NaN"):
            gptq(weight, hessian, ASYMMETRIC, name="layers.0.qkv.weight")
        values[3, 5] = before


def test_what_gptq_cannot_do_is_refused() -> None:
    weight, hessian = gaussian(8, 64), np.eye(64, dtype=np.float32)
    with pytest.raises(QuantizationError, match="4-bit"):
        gptq(weight, hessian, BlockFormat(8, 32, symmetric=True))
    with pytest.raises(WeightError, match="64 columns"):
        gptq(weight, hessian[:32, :32], ASYMMETRIC)
    with pytest.raises(QuantizationError, match="not positive definite"):
        gptq(weight, -hessian + 3 * np.ones((64, 64), np.float32), ASYMMETRIC)


@pytest.mark.parametrize("fmt", [ASYMMETRIC, BlockFormat(4, 128, symmetric=True)], ids=str)
def test_every_pass_of_refinement_lowers_the_damped_loss(fmt: BlockFormat) -> None:
    inputs, weight = correlated_inputs(512, 200), gaussian(48, 200)
    hessian = inputs.T.astype(np.float64) @ inputs
    damped = hessian + 0.1 * np.trace(hessian) / 200 * np.eye(200)

    def loss(passes: int) -> NDArray[np.float64]:
        difference = weight - dequantize(gptq(weight, hessian, fmt, damping=0.1, passes=passes)).astype(np.float64)
        return np.asarray(np.einsum("ij,jk,ik->i", difference, damped, difference))

    losses = [loss(passes) for passes in (0, 1, 2, 4)]
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()
    assert losses[-1].sum() < 0.99 * losses[0].sum()


def test_refined_codes_and_scales_cannot_be_bettered_one_at_a_time() -> None:
    fmt = BlockFormat(4, 32, symmetric=True)
    inputs, weight = correlated_inputs(512, 64), gaussian(16, 64)
    hessian = inputs.T.astype(np.float64) @ inputs
    damped = hessian + 0.1 * np.trace(hessian) / 64 * np.eye(64)
    result = gptq(weight, hessian, fmt, damping=0.1, passes=60)
    codes = unpack_nibbles(result.codes, 32).reshape(16, 64).astype(np.float64) - 8
    scales = np.repeat(result.scales.astype(np.float64), 32, axis=1)

    def loss(quantized: NDArray[np.float64]) -> NDArray[np.float64]:
        difference = weight - quantized
        return np.asarray(np.einsum("ij,jk,ik->i", difference, damped, difference))

    found = loss(codes * scales)
    for column in range(64):
        for step in (-1, 1):
            other = codes.copy()
            other[:, column] = np.clip(other[:, column] + step, -8, 7)
            assert (loss(other * scales) >= found * (1 - 1e-6)).all()
    for block in range(2):
        for factor in (0.99, 1.01):
            other = scales.copy()
            other[:, 32 * block : 32 * block + 32] *= factor
            assert (loss(codes * other) >= found * (1 - 1e-6)).all()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_compensation_is_the_ridge_regression_on_what_the_layer_really_sees(strength: float) -> None:
    wanted, weight = correlated_inputs(600, 48).astype(np.float64), gaussian(20, 48)
    actual = wanted + 0.3 * correlated_inputs(600, 48, seed=9)
    hessian, cross = actual.T @ actual, actual.T @ (wanted - actual)
    found = compensate(weight, hessian.astype(np.float32), cross.astype(np.float32), strength=strength, damping=0.02)
    ridge = np.sqrt(0.02 * np.trace(hessian) / 48) * np.eye(48)
    # the change from W is what least squares finds, with rows that ask for no change
    missing = np.concatenate([(wanted - actual) @ weight.T, np.zeros((48, 20))])
    change, *_ = np.linalg.lstsq(np.concatenate([actual, ridge]), missing, rcond=None)
    np.testing.assert_allclose(found, weight + strength * change.T, rtol=0, atol=1e-5 * float(np.abs(weight).max()))
    if strength == 1.0:
        assert output_error_between(wanted, weight, actual, found) < output_error_between(
            wanted, weight, actual, weight
        )


def output_error_between(
    wanted: NDArray[np.float64], weight: Floats, actual: NDArray[np.float64], ours: Floats
) -> float:
    return float(np.square(wanted @ weight.T - actual @ ours.T).sum())


def test_inputs_without_drift_need_no_compensation() -> None:
    weight, inputs = gaussian(8, 32), correlated_inputs(100, 32)
    nothing = np.zeros((32, 32), np.float32)
    np.testing.assert_array_equal(compensate(weight, inputs.T @ inputs, nothing), weight)
    np.testing.assert_array_equal(compensate(weight, nothing, nothing), weight)
