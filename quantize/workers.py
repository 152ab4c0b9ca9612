"""Matrix products on all cores whose bytes do not depend on how many there are.

A library cuts a product into as many pieces as it has threads, and other pieces round differently. Here it has one
thread, and the pieces, always the same ones, go to threads of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgephi.ort import open_session, session_options

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Floats = NDArray[np.float32]

COLUMNS = 1024
"""Of the right factor, in one piece."""
IR_VERSION, OPSET = 10, 21
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


def multiply(left: Floats, right: Floats, *, transposed: bool = False) -> Floats:
    """left @ right on the calling thread; float32 [m, n] of [m, k], or [k, m] where it is transposed, and [k, n].

    onnxruntime's product: of 128 x 3,072 and 3,072 x 512 values an AMD EPYC (Zen 5) makes 219 GFLOP/s with it, and 127
    with NumPy's OpenBLAS. Worth it from some 64 rows and columns on.
    """
    result: Floats = _gemm(transposed).run(None, {"left": left, "right": right})[0]
    return result


@cache
def _gemm(transposed: bool) -> InferenceSession:
    from onnx import TensorProto, helper

    node = helper.make_node("Gemm", ["left", "right"], ["product"], transA=int(transposed))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("left", "right")]
    outputs = [helper.make_tensor_value_info("product", TensorProto.FLOAT, [None, None])]
    graph = helper.make_graph([node], "product", inputs, outputs)
    model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)])
    options = session_options(threads=1, spinning=False, arena=False)
    remedy = "Report this with the versions of onnxruntime and onnx"
    return open_session(model.SerializeToString(), options, where="matrix product", remedy=remedy)


def product(pool: ThreadPoolExecutor, left: Floats, right: Floats) -> Floats:
    """left @ right, float32 [m, n] of [m, k] and [k, n]."""
    result = np.empty((len(left), right.shape[1]), np.float32)

    def piece(start: int) -> None:
        part = slice(start, start + COLUMNS)
        result[:, part] = multiply(left, right[:, part])

    list(pool.map(piece, range(0, right.shape[1], COLUMNS)))
    return result


def add_gram(pool: ThreadPoolExecutor, total: Floats, rows: Floats, others: Floats | None = None) -> None:
    """Add rows^T rows, or rows^T others, to total [n, n]; of the former the upper triangle of tiles only."""

    def tile(start: int) -> None:
        part = slice(start, start + TILE)
        first = start if others is None else 0
        right = (rows if others is None else others)[:, first:]
        total[part, first:] += multiply(rows[:, part], right, transposed=True)

    list(pool.map(tile, range(0, len(total), TILE)))


def mirror(total: Floats) -> None:
    """Fill the lower triangle of tiles that `add_gram` left out."""
    for start in range(0, len(total), TILE):
        part = slice(start, start + TILE)
        total[start + TILE :, part] = total[part, start + TILE :].T
