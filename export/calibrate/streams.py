"""What calibration knows of a linear layer: its inputs in the float model and in the one that is quantized so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgephi.quantize.workers import add_gram, mirror, worker_pool

Float32 = NDArray[np.float32]

ROWS_AT_ONCE = 2048
"""Inputs multiplied together: 64 MB at 8,192 columns."""


@dataclass(frozen=True)
class LayerInputs:
    """Hidden states at one place of the decoder, float32 [sequences, length, hidden]."""

    float: Float32
    """Of the float model."""
    quantized: Float32
    """Of the model whose earlier layers are quantized."""


def gather(pairs: Iterable[tuple[Float32, Float32]], columns: int) -> tuple[Float32, Float32]:
    """Hessian A^T A and drift A^T (X - A), float32 [columns, columns].

    Args:
        pairs: of every sequence the inputs A in the quantized model and X in the float one, both [length, columns].
    """
    hessian, cross = np.zeros((2, columns, columns), np.float32)
    quantized: list[Float32] = []
    wanted: list[Float32] = []

    def add() -> None:
        # a product of many rows is worth more than its sum costs
        rows = np.concatenate(quantized)
        drift = np.concatenate(wanted)
        drift -= rows
        add_gram(pool, hessian, rows)
        add_gram(pool, cross, rows, drift)
        quantized.clear()
        wanted.clear()

    with worker_pool() as pool:
        for ours, theirs in pairs:
            quantized.append(ours)
            wanted.append(theirs)
            if sum(map(len, quantized)) >= ROWS_AT_ONCE:
                add()
        if quantized:
            add()
    mirror(hessian)
    return hessian, cross
