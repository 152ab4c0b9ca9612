"""Sums of products whose bytes do not depend on the processor.

np.einsum and BLAS multiply and add in one instruction where a processor has one that rounds once, and otherwise round
twice. A ufunc rounds every product, and adding ufuncs leave no choice of order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

PARTS = 4
"""Of a block's products, made one after the other: what is in work stays in a core's cache."""


def column_dots(a: Floats, b: Floats, work: Floats | None = None) -> Floats:
    """The dot products of the columns of a and b, float32 [columns].

    Args:
        a, b: float32 [rows, columns], the rows a power of two from `PARTS` on.
        work: float32 [rows // 2, columns], overwritten; None: made here.
    """
    rows = len(a) // PARTS
    total, part = (np.empty((2 * rows, a.shape[1]), np.float32) if work is None else work).reshape(2, rows, -1)
    np.multiply(a[:rows], b[:rows], out=total)
    for start in range(rows, len(a), rows):
        np.multiply(a[start : start + rows], b[start : start + rows], out=part)
        np.add(total, part, out=total)
    while rows > 1:
        rows //= 2
        np.add(total[:rows], total[rows : 2 * rows], out=total[:rows])
    result: Floats = total[0].copy()
    return result
