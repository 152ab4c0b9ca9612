"""Coordinate descent on the codes and scales that GPTQ found.

GPTQ decides every column once, before those after it are known. Here every code moves to the value that is best while
all others stay, block after block, and after every block its scale to the least-squares one. No step makes
the sum of e H e^T over the rows e of W - Q larger. Codes: Behdin et al. 2023, "QuantEase" (arXiv 2309.01885).
"""

from __future__ import annotations

import numpy as np

from edgephi.quantize.gptq_block import TOGETHER, Floats, Grid, blocks_together
from edgephi.quantize.workers import multiply


def refine(
    error: Floats,
    codes: Floats,
    grids: list[Grid],
    hessian: Floats,
    damping: np.float32,
    block_size: int,
    span: np.float32,
) -> None:
    """One pass over all columns, in place.

    Args:
        error: W - Q, transposed: [columns, rows]; kept up to date.
        codes: codes minus zero point, [columns, rows].
        grids: of every block.
        hessian: [columns, columns], without damping.
        damping: what counts as added to its diagonal.
        block_size: columns of a block; the last may have fewer.
        span: largest stored code.
    """
    columns, step = len(error), blocks_together(block_size)
    for first in range(0, len(grids), step):
        start, end = first * block_size, min((first + step) * block_size, columns)
        gradient = multiply(hessian[start:end], error)
        gradient += damping * error[start:end]
        for number in range(first, min(first + step, len(grids))):
            part = slice(number * block_size, min((number + 1) * block_size, columns))
            inner = hessian[part, part].copy()
            inner[np.diag_indices_from(inner)] += damping
            before = error[part].copy()
            within = slice(part.start - start, part.stop - start)
            _refine_block(error[part], codes[part], grids[number], gradient[within], inner, span)
            if part.stop < end:
                gradient[within.stop :] += hessian[part.stop : end, part] @ (error[part] - before)


def _refine_block(error: Floats, codes: Floats, grid: Grid, gradient: Floats, inner: Floats, span: np.float32) -> None:
    """`gradient`: H e of the block's columns [columns, rows], used up; `inner`: H of these columns."""
    scale, low, high = grid.scale, grid.low, grid.low + span
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    change = np.empty_like(error)
    for start in range(0, len(error), TOGETHER):
        stop = min(start + TOGETHER, len(error))
        for j in range(start, stop):
            slope = gradient[j]
            if j > start:
                slope += inner[j, start:j] @ change[start:j]
            # where the code would go if it were no integer
            moved = codes[j] + slope * (inverse / inner[j, j])
            np.rint(moved, out=moved)
            np.maximum(moved, low, out=moved)
            np.minimum(moved, high, out=moved)
            moved -= codes[j]
            codes[j] += moved
            np.multiply(moved, -scale, out=change[j])
        error[start:stop] += change[start:stop]
        if stop < len(error):
            gradient[stop:] += inner[stop:, start:stop] @ change[start:stop]
        if start:
            gradient[:start] += inner[:start, start:stop] @ change[start:stop]
        gradient[start:stop] += np.triu(inner[start:stop, start:stop]) @ change[start:stop]
    along = inner @ codes
    gain, square = np.einsum("ij,ij->j", gradient, codes), np.einsum("ij,ij->j", along, codes)
    step = np.divide(gain, square, out=np.zeros_like(gain), where=square > 0)
    grid.scale = grid.allowed(scale + step)
    error -= codes * (grid.scale - scale)
