"""int4 weights whose block scales are small multiples of one scale a row: what the Hexagon NPU multiplies in integers.

Qualcomm's name is LPBQ (low power block quantization), and "block expansion" for the encoding. An element is
`code * block scale * channel scale` with codes -8 to 7 and block scales 1 to 16. Source: onnxruntime,
core/providers/qnn/builder/qnn_node_group/lpbqmatmul_fusion.cc. Larger block scales are accepted by the compiler of
QAIRT 2.51 and give wrong products without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import QuantizationError, WeightError
from edgephi.quantize.formats import BLOCK_SIZES

Floats = NDArray[np.float32]

LARGEST_SCALE = 16
LOWEST_CODE, HIGHEST_CODE = -8, 7
SHRINKS = (1.0, 0.93, 0.86, 0.79)
"""Channel scales that are tried, as parts of the one that clips nothing."""
STEPS_DOWN = (0, 1, 2)
"""Block scales that are tried, below the one that clips nothing."""
VALUES_AT_ONCE = 1 << 19
LARGEST_WEIGHT = 2.0**60


@dataclass(frozen=True)
class LpbqFormat:
    """Columns that share a block scale: 16, 32, 64 or 128."""

    block_size: int


@dataclass(frozen=True)
class LpbqWeight:
    """A weight [rows, columns].

    Attributes:
        codes: int8 [rows, columns], -8 to 7.
        block_scales: uint8 [rows, blocks], 1 to 16.
        channel_scales: float32 [rows], positive.
    """

    codes: NDArray[np.int8]
    block_scales: NDArray[np.uint8]
    channel_scales: NDArray[np.float32]

    def values(self) -> Floats:
        """What it decodes to, float32 [rows, columns]."""
        scales = self.block_scales * self.channel_scales[:, None]
        blocks = self.codes.reshape(*scales.shape, -1)
        decoded: Floats = (blocks * scales[..., None]).astype(np.float32).reshape(self.codes.shape)
        return decoded


def quantize_lpbq(weight: Floats, fmt: LpbqFormat, *, name: str) -> LpbqWeight:
    """Round to nearest, with the scales that leave the least squared error among those tried.

    Args:
        weight: float32 [rows, columns], whole blocks.
        name: the weight's, for error messages.

    Raises:
        QuantizationError: the rows are not whole blocks, or magnitudes beyond 2**60.
        WeightError: NaN or infinite values.
    """
    rows, columns = weight.shape
    block_size = fmt.block_size
    if block_size not in BLOCK_SIZES or columns % block_size:
        raise QuantizationError(
            f"rows of {columns} values are not blocks of {block_size}",
            where=name,
            remedy="Choose a --block-size that divides them",
        )
    codes = np.empty((rows, columns), np.int8)
    block_scales = np.empty((rows, columns // block_size), np.uint8)
    channel_scales = np.empty(rows, np.float32)
    step = max(1, VALUES_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        blocks = weight[part].reshape(-1, columns // block_size, block_size)
        found, block_scales[part], channel_scales[part] = _quantize(blocks, name)
        codes[part] = found.reshape(-1, columns)
    return LpbqWeight(codes, block_scales, channel_scales)


def _quantize(blocks: Floats, name: str) -> tuple[Floats, Floats, Floats]:
    """Codes [rows, blocks, block_size], block scales [rows, blocks], channel scales [rows], all float32."""
    peaks = np.abs(blocks).max(axis=2)
    if not np.isfinite(peaks).all():
        raise WeightError("the weight holds NaN or infinite values", where=name, remedy="Check the checkpoint")
    if peaks.max() > LARGEST_WEIGHT:
        raise QuantizationError(
            f"the weight holds magnitudes up to {peaks.max():.3g}", where=name, remedy="Check the checkpoint"
        )
    highest = peaks.max(axis=1)
    # a row of zeros needs a scale that is one
    whole = np.where(highest < 2.0**-60, np.float32(1), highest / np.float32(HIGHEST_CODE * LARGEST_SCALE))
    best_error = np.full(len(blocks), np.inf, np.float32)
    best = np.empty_like(blocks), np.empty_like(peaks)
    for shrink in SHRINKS:
        channel = (whole * np.float32(shrink)).astype(np.float32)
        codes, scales, errors = _round(blocks, peaks, channel)
        better = errors < best_error
        best_error[better] = errors[better]
        best[0][better], best[1][better] = codes[better], scales[better]
    codes, scales = best
    # the least-squares channel scale for these codes
    multiples = codes * scales[..., None]
    product = (multiples * blocks).sum(axis=(1, 2))
    square = np.square(multiples).sum(axis=(1, 2))
    channel = np.divide(product, square, out=np.ones_like(product), where=square > 0)
    return codes, scales, channel


def _round(blocks: Floats, peaks: Floats, channel: Floats) -> tuple[Floats, Floats, Floats]:
    """Best codes and block scales for given channel scales, and the squared error of each row."""
    unclipped = np.ceil(peaks / (np.float32(HIGHEST_CODE) * channel[:, None]))
    best_error = np.full_like(peaks, np.inf)
    best_codes, best_scales = np.empty_like(blocks), np.empty_like(peaks)
    for down in STEPS_DOWN:
        scales = np.clip(unclipped - np.float32(down), 1, LARGEST_SCALE)
        step = (scales * channel[:, None])[..., None]
        codes = np.clip(np.rint(blocks / step), LOWEST_CODE, HIGHEST_CODE)
        difference = blocks - codes * step
        errors = np.square(difference, out=difference).sum(axis=2)
        better = errors < best_error
        np.copyto(best_error, errors, where=better)
        np.copyto(best_scales, scales, where=better)
        np.copyto(best_codes, codes, where=better[..., None])
    return best_codes, best_scales, best_error.sum(axis=1)
