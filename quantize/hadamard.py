"""Random rotations that are quick to apply: Hadamard matrices, their rows multiplied by random signs.

A rotation spreads what is large in a few channels over all of them, so that blocks of a weight have no outliers.
Source: Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456, for the use; Paley 1933 for orders that are no power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Orthogonal:
    """Q = diag(signs) · (left ⊗ right), an orthogonal matrix of size left · right.

    The product with a vector costs left + right multiplications a value, where Q itself would cost left · right.
    """

    signs: Float32
    left: Float32
    right: Float32

    @property
    def size(self) -> int:
        return len(self.signs)


@cache
def random_rotation(size: int, seed: int) -> Orthogonal:
    """A random orthogonal matrix; the same seed gives the same one.

    It is a Hadamard matrix with random signs where the size has one that is made of Sylvester's and Paley's, which
    holds for the width of every published Phi. Otherwise the odd part of the size is a Haar-distributed rotation.
    """
    rng = np.random.default_rng([seed, size])
    signs = rng.choice(np.array([-1, 1], np.float32), size)
    left = _split(size)
    factors = (_hadamard_or_haar(order, rng) for order in (left, size // left))
    return Orthogonal(signs, *(np.asarray(factor, np.float32) for factor in factors))


def rotate(values: Float32, rotation: Orthogonal) -> Float32:
    """values · Q for every `size` consecutive columns: float32 [rows, k · size] to the same shape, a new array."""
    a, b = len(rotation.left), len(rotation.right)
    signed = values.reshape(-1, rotation.size) * rotation.signs
    right = (signed.reshape(-1, b) @ rotation.right).reshape(-1, a, b)
    rotated: Float32 = np.matmul(rotation.left.T, right).reshape(values.shape)
    return rotated


def hadamard(order: int) -> Float64 | None:
    """A matrix of 1 and -1 whose rows are orthogonal, [order, order]; None where no construction here gives one."""
    match _construction(order):
        case "one":
            return np.ones((1, 1))
        case "Paley I":
            return _paley_first(order - 1)
        case "Sylvester":
            half = hadamard(order // 2)
            return None if half is None else np.block([[half, half], [half, -half]])
        case "Paley II":
            return _paley_second(order // 2 - 1)
        case None:
            return None


def _construction(order: int) -> Literal["one", "Paley I", "Sylvester", "Paley II"] | None:
    if order == 1:
        return "one"
    if order % 2:
        return None
    if order % 4 == 0 and _is_prime(order - 1):
        return "Paley I"
    if _construction(order // 2) is not None:
        return "Sylvester"
    q = order // 2 - 1
    return "Paley II" if q % 4 == 1 and _is_prime(q) else None


def _split(size: int) -> int:
    """The left factor's order: both have Hadamard matrices, or else one is the largest power of two that divides."""
    lefts = [left for left in range(1, isqrt(size) + 1) if size % left == 0]
    fit = [left for left in lefts if _construction(left) and _construction(size // left)]
    return max(fit) if fit else size & -size


def _hadamard_or_haar(order: int, rng: np.random.Generator) -> Float64:
    matrix = hadamard(order)
    if matrix is not None:
        return np.asarray(matrix / np.sqrt(order), np.float64)
    q, r = np.linalg.qr(rng.standard_normal((order, order)))
    # the signs make the distribution uniform: Mezzadri 2007, "How to generate random matrices from the classical ..."
    haar: Float64 = q * np.sign(np.diag(r))
    return haar


def _paley_first(q: int) -> Float64:
    """Order q + 1, for a prime q that leaves 3 when divided by 4."""
    return np.eye(q + 1) + _conference(q, lower=-1.0)


def _paley_second(q: int) -> Float64:
    """Order 2 (q + 1), for a prime q that leaves 1 when divided by 4."""
    conference = _conference(q, lower=1.0)
    signs, rest = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(conference, signs) + np.kron(np.eye(q + 1), rest)


def _conference(q: int, lower: float) -> Float64:
    """Quadratic residues of row minus column, bordered by ones: zeros on the diagonal, 1 and -1 elsewhere."""
    residues = np.full(q, -1.0)
    residues[np.arange(1, q) ** 2 % q] = 1.0
    residues[0] = 0.0
    numbers = np.arange(q)
    matrix = np.zeros((q + 1, q + 1))
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = lower
    matrix[1:, 1:] = residues[(numbers[:, None] - numbers) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % each for each in range(2, isqrt(number) + 1))
