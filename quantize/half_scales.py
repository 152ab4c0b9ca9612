"""Block scales in float16, the form in which they are stored.

From 2**-14 on float16 has 11 bits, and rounding a scale to them changes a weight by less than its codes can tell.
Below, float16 counts in steps of 2**-24: a scale of 2**-20 keeps 4 bits, one below 2**-25 becomes 0. There the codes
have to be chosen for the scale that is stored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SMALLEST_EXACT = np.float32(2.0**-14)
"""The smallest scale that float16 keeps with all its bits."""
STEP = np.float32(2.0**-24)
"""Between float16's numbers below that."""


def is_coarse(scale: Floats) -> NDArray[np.bool_]:
    """Where float16 has fewer bits for a scale than it has for others; 0 is exact."""
    size = np.abs(scale)
    coarse: NDArray[np.bool_] = (size < SMALLEST_EXACT) & (size > 0)
    return coarse


def settled(scale: Floats) -> Floats:
    """Scales, the coarse ones moved to the nearest step, away from 0; the others as they are."""
    coarse = is_coarse(scale)
    if not coarse.any():
        return scale
    steps = np.maximum(np.rint(np.abs(scale) / STEP), np.float32(1))
    return np.where(coarse, np.copysign(steps * STEP, scale), scale)
