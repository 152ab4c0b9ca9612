"""Matrix products on all cores whose bytes do not depend on how many there are.

A BLAS library cuts a product into as many pieces as it has threads, and other pieces round differently. Here it has one
thread, and the pieces, always the same ones, go to threads of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

COLUMNS = 1024
"""Of the right factor, in one piece."""
TILE = 512
"""Columns of a Gram matrix in one piece."""


@contextmanager
def worker_pool() -> Iterator[ThreadPoolExecutor]:
    """One thread for each core that this process may use, up to 8; meanwhile NumPy's BLAS has one."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(worker_threads(), "edgephi-fit") as pool:
        yield pool


def worker_threads() -> int:
    """Threads of a pool."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def product(pool: ThreadPoolExecutor, left: Floats, right: Floats) -> Floats:
    """left @ right, float32 [m, n] of [m, k] and [k, n]."""
    result = np.empty((len(left), right.shape[1]), np.float32)

    def piece(start: int) -> None:
        part = slice(start, start + COLUMNS)
        np.matmul(left, right[:, part], out=result[:, part])

    list(pool.map(piece, range(0, right.shape[1], COLUMNS)))
    return result


def add_gram(pool: ThreadPoolExecutor, total: Floats, rows: Floats, others: Floats | None = None) -> None:
    """Add rows^T rows, or rows^T others, to total [n, n]; of the former the upper triangle of tiles only."""

    def tile(start: int) -> None:
        part = slice(start, start + TILE)
        first = start if others is None else 0
        total[part, first:] += rows[:, part].T @ (rows if others is None else others)[:, first:]

    list(pool.map(tile, range(0, len(total), TILE)))


def mirror(total: Floats) -> None:
    """Fill the lower triangle of tiles that `add_gram` left out."""
    for start in range(0, len(total), TILE):
        part = slice(start, start + TILE)
        total[start + TILE :, part] = total[part, start + TILE :].T
