"""int8 weights with a scale for each row: where four bits lose too much and blocks are not to be had."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import WeightError


def quantize_rows(weight: NDArray[np.float32], *, name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round to nearest: codes int8 [rows, columns] from -127 to 127, and scales float32 [rows], positive.

    Raises:
        WeightError: NaN or infinite values; `name` is the weight's.
    """
    peaks = np.abs(weight).max(axis=1)
    if not np.isfinite(peaks).all():
        raise WeightError("the weight holds NaN or infinite values", where=name, remedy="Check the checkpoint")
    # a row of zeros needs a scale that is one
    scales = np.where(peaks < 2.0**-60, np.float32(1), peaks / np.float32(127)).astype(np.float32)
    return np.rint(weight / scales[:, None]).astype(np.int8), scales
