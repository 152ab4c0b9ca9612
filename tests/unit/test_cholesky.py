"""Factors in float32, in place: what they multiply back to, and what they solve, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from edgephi.quantize.cholesky import factor, solve
from edgephi.quantize.workers import worker_pool


@pytest.mark.parametrize("size", [1, 37, 512, 513, 1700])
def test_the_factor_multiplies_back_and_solves(size: int) -> None:
    rng = np.random.default_rng(size)
    inputs = rng.standard_normal((size + 40, size)) @ np.diag(np.geomspace(1, 30, size))
    matrix = (inputs.T @ inputs).astype(np.float32)
    matrix[np.diag_indices(size)] += np.float32(0.1 * np.trace(matrix) / size)
    right = rng.standard_normal((size, 7)).astype(np.float32)
    lower, found = matrix.copy(), right.copy()
    with worker_pool() as pool:
        inverses = factor(pool, lower)
    solve(lower, inverses, found)
    exact = np.linalg.cholesky(matrix.astype(np.float64))
    assert np.abs(lower - exact).max() < 1e-5 * np.abs(exact).max()
    assert not np.triu(lower, 1).any()
    wanted = np.linalg.solve(matrix.astype(np.float64), right)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("size", [8, 700])
def test_a_matrix_that_is_not_positive_definite_is_an_error(size: int) -> None:
    matrix = np.eye(size, dtype=np.float32)
    matrix[-1, -1] = -1
    with worker_pool() as pool, pytest.raises(np.linalg.LinAlgError):
        factor(pool, matrix)
