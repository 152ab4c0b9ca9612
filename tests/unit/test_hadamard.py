"""Random rotations: orthogonal, spread evenly, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from edgephi.quantize.formats import BlockFormat, dequantize
from edgephi.quantize.hadamard import hadamard, random_rotation, rotate
from edgephi.quantize.round_to_nearest import round_to_nearest

PUBLISHED_WIDTHS = (576, 960, 2048, 2560, 3072, 4096, 5120)
"""SmolLM2, phi-1 and 1.5, phi-2, Phi-3 and 4 mini, Phi-3-small, Phi-3-medium and Phi-4."""


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 40, 48, 64, 80, 576])
def test_hadamard_matrices_hold_ones_and_have_orthogonal_rows(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None and set(np.unique(matrix)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [3, 6, 52])
def test_orders_without_a_construction_are_said_to_have_none(order: int) -> None:
    """3 and 6 have no such matrix; 52 has, but by neither Sylvester nor a prime."""
    assert hadamard(order) is None


@pytest.mark.parametrize("size", [16, 48, 50, 52, 96, 576])
def test_a_rotation_is_orthogonal_for_every_size(size: int) -> None:
    q = random_rotation(size, 0)
    dense = np.diag(q.signs.astype(np.float64)) @ np.kron(q.left.astype(np.float64), q.right.astype(np.float64))
    np.testing.assert_allclose(dense.T @ dense, np.eye(size), atol=1e-6)
    values = np.random.default_rng(1).standard_normal((5, 3 * size)).astype(np.float32)
    expected = (values.reshape(5, 3, size) @ dense).reshape(5, 3 * size)
    np.testing.assert_allclose(rotate(values, q), expected, atol=1e-5)


@pytest.mark.parametrize("size", PUBLISHED_WIDTHS)
def test_one_channel_is_spread_evenly_over_all_for_every_published_width(size: int) -> None:
    one = np.zeros((1, size), np.float32)
    one[0, size // 3] = 1
    np.testing.assert_allclose(np.abs(rotate(one, random_rotation(size, 0))), size**-0.5, rtol=1e-5)


def test_the_seed_decides() -> None:
    first, again, other = (random_rotation(64, seed).signs for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_outliers_in_a_few_channels_cost_less_after_rotation() -> None:
    """Channels 20 times as large set the scale of their blocks, to which the others are rounded."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 512)).astype(np.float32)
    weight[:, rng.choice(512, 8, replace=False)] *= 20
    fmt = BlockFormat(bits=4, block_size=64, symmetric=True)

    def error(values: np.typing.NDArray[np.float32]) -> float:
        return float(np.square(dequantize(round_to_nearest(values, fmt)) - values).sum() / np.square(values).sum())

    assert error(rotate(weight, random_rotation(512, 0))) < 0.7 * error(weight)
