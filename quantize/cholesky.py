"""Cholesky factors of large symmetric matrices in float32, in place, on all cores.

NumPy's own work in float64 whatever they are given, and copy twice: 1.7 GB for 8,192 columns, where this takes only the
matrix itself. Blocks on the diagonal (64-bit) and products between blocks are all there is to it: Golub and Van Loan,
"Matrix Computations", 4.2.9. Pieces are of fixed size, so bytes do not depend on the number of cores.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edgephi.quantize.workers import COLUMNS, multiply, product

Floats = NDArray[np.float32]

BLOCK = 512


def factor(pool: ThreadPoolExecutor, matrix: Floats) -> list[Floats]:
    """Replace a positive definite matrix [n, n] by its Cholesky factor L, zeros above; L L^T is the matrix.

    Returns:
        The inverses of L's blocks on the diagonal, of `BLOCK` columns each, for `solve`.

    Raises:
        LinAlgError: the matrix is not positive definite.
    """
    inverses = []
    for start in range(0, len(matrix), BLOCK):
        stop = min(start + BLOCK, len(matrix))
        corner = np.linalg.cholesky(matrix[start:stop, start:stop].astype(np.float64))
        inverse = np.linalg.inv(corner).astype(np.float32)
        inverses.append(inverse)
        matrix[start:stop, start:stop] = corner
        matrix[start:stop, stop:] = 0
        below = product(pool, inverse, matrix[stop:, start:stop].T)  # transposed: [block, rows below]
        matrix[stop:, start:stop] = below.T
        _subtract_gram(pool, matrix[stop:, stop:], below)
    return inverses


def _subtract_gram(pool: ThreadPoolExecutor, rest: Floats, below: Floats) -> None:
    """rest -= below^T below, its lower triangle of pieces."""

    def piece(start: int) -> None:
        part = slice(start, start + COLUMNS)
        rest[start:, part] -= multiply(below[:, start:], below[:, part], transposed=True)

    list(pool.map(piece, range(0, len(rest), COLUMNS)))


def solve(lower: Floats, inverses: list[Floats], right: Floats) -> None:
    """Replace right [n, m] by X with L L^T X = right, on the calling thread.

    Args:
        lower, inverses: what `factor` made.
        right: contiguous.
    """
    starts = [number * BLOCK for number in range(len(inverses))]
    for start, inverse in zip(starts, inverses, strict=True):
        rows = slice(start, start + len(inverse))
        rest = right[rows] - multiply(lower[rows, :start], right[:start]) if start else right[rows]
        right[rows] = multiply(inverse, rest)
    for start, inverse in reversed(list(zip(starts, inverses, strict=True))):
        stop = start + len(inverse)
        rest = right[start:stop]
        if stop < len(lower):
            rest = rest - multiply(lower[stop:, start:stop], right[stop:], transposed=True)
        right[start:stop] = multiply(inverse, rest, transposed=True)
