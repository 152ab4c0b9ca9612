"""int8 weights with a scale for each row: where four bits lose too much and blocks are not to be had."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import WeightError


@dataclass(frozen=True)
class ChannelFormat:
    """8 bits, symmetric, one scale a row."""


@dataclass(frozen=True)
class ChannelWeight:
    """A weight [rows, columns].

    Attributes:
        codes: int8 [rows, columns], -127 to 127.
        scales: float32 [rows], positive.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    def values(self) -> NDArray[np.float32]:
        """What it decodes to, float32 [rows, columns]."""
        return self.codes * self.scales[:, None]


def quantize_rows(weight: NDArray[np.float32], *, name: str) -> ChannelWeight:
    """Round to nearest.

    Raises:
        WeightError: NaN or infinite values; `name` is the weight's.
    """
    peaks = np.abs(weight).max(axis=1)
    if not np.isfinite(peaks).all():
        raise WeightError("the weight holds NaN or infinite values", where=name, remedy="Check the checkpoint")
    # a row of zeros needs a scale that is one
    scales = np.where(peaks < 2.0**-60, np.float32(1), peaks / np.float32(127)).astype(np.float32)
    return ChannelWeight(np.rint(weight / scales[:, None]).astype(np.int8), scales)
