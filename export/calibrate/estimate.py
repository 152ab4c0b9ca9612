"""How long an export will take on this machine, before it begins: operations counted, over a speed measured now.

Constants were fitted to exports on two cores of an AMD EPYC; `benchmarks/studies/quality.py` prints what an export took
beside what was expected of it.
"""

from __future__ import annotations

import time

import numpy as np

from edgephi.export.spec import Architecture, Weight
from edgephi.quantize.workers import multiply, worker_pool, worker_threads

NANOSECONDS_TO_ROUND = 9.0
"""Of one core, for each weight that is read, rounded and written."""
NANOSECONDS_TO_WEIGH = 14.0
"""More, where columns are weighted."""
NANOSECONDS_TO_FIT = 150.0
"""More, where codes are fitted, besides matrix products."""
SLOWER_TO_SAMPLE = 6.0
"""A product of 8 rows, when a model writes its text, against the same operations in a large one."""


def machine_speed() -> float:
    """Floating-point operations a second in large products on all threads, measured in a fraction of a second."""
    rng = np.random.default_rng(0)
    left, right = rng.random((256, 1024), np.float32), rng.random((1024, 1024), np.float32)
    threads = worker_threads()
    multiply(left, right)
    with worker_pool() as pool:
        started = time.perf_counter()
        list(pool.map(lambda _: multiply(left, right), range(8 * threads)))
        seconds = time.perf_counter() - started
    return 2.0 * 256 * 1024 * 1024 * 8 * threads / seconds


def passing(weights: list[Weight], tokens: int) -> float:
    """Operations to pass tokens through linear weights once."""
    return sum(2.0 * rows * columns * tokens for rows, columns in map(_shape, weights))


def fitting(weights: list[Weight], tokens: int) -> float:
    """Operations of `pack_fitted` for these weights, attention left out.

    Two streams of tokens, Hessian and drift, two factorizations, compensation, GPTQ and a pass of refinement.
    """
    total = 2 * passing(weights, tokens)
    for rows, columns in map(_shape, weights):
        total += 3.0 * columns * columns * tokens + 2 / 3 * columns**3 + 7.0 * columns * columns * rows
    return total


def linear_weights(architecture: Architecture) -> list[Weight]:
    """Those that a text passes through; of experts two see a token, so a layer of them counts as much as two."""
    return [weight for weight in architecture.weights.values() if weight.role == "linear"]


def _shape(weight: Weight) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns
