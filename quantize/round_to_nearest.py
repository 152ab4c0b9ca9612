"""Round-to-nearest quantization with a search for each block's scale and zero point.

Codes c = q - zero point approximate a block w by s * c. For given codes the best scale in squared error is
s = <w, c> / <c, c> (linear least squares), and it leaves <w, w> - <w, c>^2 / <c, c>. A candidate scale is therefore
judged by <w, c>^2 / <c, c> alone: what counts is the codes it rounds to, not the candidate itself.

Where columns differ in importance d, squared errors count d times, and the same holds with <a, b> = sum of d a b.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import QuantizationError, WeightError
from edgephi.quantize.formats import BlockFormat, QuantizedWeight, pack_nibbles
from edgephi.quantize.half_scales import STEP, is_coarse
from edgephi.quantize.lpbq import LpbqFormat, quantize_lpbq
from edgephi.quantize.per_channel import quantize_rows
from edgephi.quantize.quantizer import Format, Statistics, StoredWeight
from edgephi.quantize.sums import column_dots

Floats = NDArray[np.float32]

# Elements worked on at a time: 1 MB, near enough to a core's L2 cache. Smaller chunks make every ufunc so short that
# two threads spend their time handing Python's global lock to each other (2 threads, ns per weight: 15 with a quarter
# of this, 5 with this).
CHUNK_ELEMENTS = 1 << 18
# Beyond this a code times its scale, or a range of weights, could overflow float32.
LARGEST_WEIGHT = float(2.0**125)
# A symmetric 4-bit scale puts the weight of largest magnitude at minus this code. 8 comes first: a tie keeps it, and it
# reproduces a weight that lies on such a grid. Below 8 that weight is rounded to -8 or -7; above, it is clipped.
DIVISORS = (8.0, 7.0, 7.5, 8.5, 9.0)
# An asymmetric 4-bit scale divides the block's range into this many steps; codes reach 15 steps, the rest is clipped.
# Clipping lowers the squared error of blocks of every size, yet of large blocks it costs quality: there it falls on the
# few large weights that matter. SmolLM2, blocks of 128: KL 0.44 with the first set, 0.38 with the second; of 32: 0.26
# and 0.26. Three times as many candidates would lower the squared error by another 1 %.
STEPS = (14.0, 15.0, 16.0, 17.0)
STEPS_WITHOUT_CLIPPING = (14.0, 14.5, 15.0)
LARGEST_CLIPPED_BLOCK = 32
# Where importance is known, clipping falls where it does little, and more candidates pay.
STEPS_BY_IMPORTANCE = (12.5, 13.5, 14.5, 15.5, 16.5, 17.5)
# How often, then, neighbours of the best zero point are tried, and the scale that suits the best codes.
SEARCHES_BY_IMPORTANCE = 2


class _Chunk:
    """Blocks in work, as [block_size, blocks]: ufuncs then loop over blocks, and a block's sums run along axis 0.

    `low` is the code minus zero point of the smallest stored code, i.e. minus the zero point. `scratch` is like the
    weights, and `products` has half as many rows. `importance` [block_size, blocks of a row], or None: all columns
    count alike.
    """

    def __init__(
        self,
        weights: Floats,
        codes: Floats,
        scratch: Floats,
        products: Floats,
        span: int,
        importance: Floats | None = None,
    ) -> None:
        blocks = weights.shape[1]
        self.weights, self.codes, self.span = weights, codes, np.float32(span)
        self._scratch, self._products, self.importance = scratch, products, importance
        self.best_score = np.full(blocks, -1, np.float32)
        self.best_scale = np.zeros(blocks, np.float32)
        self.best_low = np.zeros(blocks, np.float32)
        self.best_fit = np.zeros(blocks, np.float32)

    def weighted(self, importance: Floats) -> _Chunk:
        """The same blocks and buffers, nothing found yet, and columns that count differently."""
        return _Chunk(self.weights, self.codes, self._scratch, self._products, int(self.span), importance)

    def consider(self, scale: Floats, low: Floats) -> None:
        """Keeps a candidate in the blocks where its codes, with their own best scale, beat the best so far."""
        _round(self.weights, scale, low, self.span, self.codes)
        product, square = self._products_with_codes(self.weights)
        fit = product / square
        score = fit * product
        better = score > self.best_score
        for best, new in (
            (self.best_score, score),
            (self.best_scale, scale),
            (self.best_low, low),
            (self.best_fit, fit),
        ):
            np.copyto(best, new, where=better)

    def flip_negative_scales(self) -> None:
        """Turns best scales -s with codes -8..7 into s with codes -7..8, the same values."""
        negative = self.best_scale < 0
        np.copyto(self.best_low, -(self.best_low + self.span), where=negative)
        np.abs(self.best_scale, out=self.best_scale)
        np.abs(self.best_fit, out=self.best_fit)

    def refit(self, scale: Floats, low: Floats) -> Floats:
        """Writes the codes; returns their best scale."""
        return scale + self._step(scale, low)[0]

    def error(self, scale: Floats, low: Floats) -> Floats:
        """Writes the codes; returns the squared error they have with their best scale."""
        step, product = self._step(scale, low)
        return column_dots(self._scratch, self._scratch, self._products) - product * step

    def _step(self, scale: Floats, low: Floats) -> tuple[Floats, Floats]:
        """Writes the codes and what they leave; returns how far their best scale is from this one, and that times its
        denominator.

        Works on the residual, so that a scale that is already exact is returned unchanged to the last bit.
        """
        _round(self.weights, scale, low, self.span, self.codes)
        np.multiply(self.codes, scale, out=self._scratch)
        np.subtract(self.weights, self._scratch, out=self._scratch)
        product, square = self._products_with_codes(self._scratch)
        return np.divide(product, square), product

    def _products_with_codes(self, values: Floats) -> tuple[Floats, Floats]:
        """<values, codes>, which may overwrite `scratch`, and <codes, codes>, 1 for codes of 0."""
        if self.importance is None:
            return column_dots(values, self.codes, self._products), np.maximum(_squares(self.codes), np.float32(1))
        counted = self._scratch
        blocks = (len(values), -1, self.importance.shape[1])
        np.multiply(values.reshape(blocks), self.importance[:, None], out=counted.reshape(blocks))
        product = column_dots(counted, self.codes, self._products)
        np.multiply(self.codes.reshape(blocks), self.importance[:, None], out=self._scratch.reshape(blocks))
        square = column_dots(self._scratch, self.codes, self._products)
        square[square == 0] = 1
        return product, square


def round_to_nearest(
    weight: Floats,
    fmt: BlockFormat,
    name: str = "weight",
    *,
    half_scales: bool = False,
    importance: Floats | None = None,
) -> QuantizedWeight:
    """Quantizes a weight block by block, minimizing each block's squared error.

    4 bits search over scales (and zero points when asymmetric); 8 bits, where rounding error is far smaller, take the
    block's extremes. The scale is always the least-squares one for the codes. The asymmetric candidates include plain
    symmetric rounding (extreme / -8), so an asymmetric weight is never further from the original than that. A weight
    that lies on a symmetric grid whose extreme code is used (-8 or ±127: GGUF's Q4_0 and Q8_0 at the
    same block size) comes back exactly.

    Besides the result this needs about 4 MB whatever the size of the weight, more only where a single row is longer
    than CHUNK_ELEMENTS. Threads may run it side by side.

    Args:
        weight: float32 [rows, columns], neither of them 0; a slice of a larger weight's rows gives the same blocks.
        fmt: the format to store.
        name: the weight's name for error messages.
        half_scales: scales will be stored in float16; codes are then chosen for what that leaves of very small ones.
        importance: how much the squared error of each column counts, positive float32 [columns] between 2**-40 and
            2**40; None: all alike. Only for 4 bits.

    Raises:
        WeightError: not a float32 matrix, empty, or holding NaN or an infinity.
        QuantizationError: a magnitude beyond 2**125, which could overflow when multiplied out.
    """
    if weight.ndim != 2 or weight.dtype != np.float32 or weight.size == 0:
        raise WeightError(
            f"expected a float32 matrix, got {weight.dtype} {list(weight.shape)}",
            where=name,
            remedy="Pass [rows, columns] as float32",
        )
    rows, columns = weight.shape
    blocks = fmt.blocks(columns)
    codes = np.empty((rows, blocks, fmt.block_size * fmt.bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zero_points = None if fmt.symmetric else np.empty((rows, -(-blocks * fmt.bits // 8)), np.uint8)

    counts: Floats | None = None
    if importance is not None:
        counts = np.empty((fmt.block_size, blocks), np.float32)
        _load(importance[None], counts)
    step = min(rows, max(1, CHUNK_ELEMENTS // (blocks * fmt.block_size)))
    work, rounded, scratch = np.empty((3, fmt.block_size * step * blocks), np.float32)
    products = np.empty(work.size // 2, np.float32)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        count = part.shape[0] * blocks
        shape = (fmt.block_size, count)
        w, c, t = (buffer[: fmt.block_size * count].reshape(shape) for buffer in (work, rounded, scratch))
        _load(part, w)
        exponent, ends = _normalize(w, name)
        chunk = _Chunk(w, c, t, products[: w.size // 2].reshape(-1, count), fmt.largest_code)
        scale, low = _quantize(chunk, fmt, *ends) if counts is None else _quantize_by(counts, chunk, fmt, *ends)
        found = np.ldexp(scale, exponent) + np.float32(0)  # no -0, which a block of zeros has on some processors
        if half_scales:
            _store_coarse_scales(chunk, found, low, exponent)
        np.subtract(c, low, out=c)
        stored = c.astype(np.uint8).T
        target = codes[start : start + step].reshape(count, -1)
        target[...] = stored if fmt.bits == 8 else pack_nibbles(stored)
        scales[start : start + step] = found.reshape(-1, blocks)
        if zero_points is not None:
            zeros = (-low).astype(np.uint8).reshape(-1, blocks)
            zero_points[start : start + step] = zeros if fmt.bits == 8 else pack_nibbles(zeros)
    return QuantizedWeight(fmt, columns, codes, scales, zero_points)


def _round(weights: Floats, scale: Floats, low: Floats, span: np.float32, codes: Floats) -> None:
    """Writes the nearest codes; a scale of zero, which only a block of zeros has, gives code 0."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    np.multiply(weights, inverse, out=codes)
    np.rint(codes, out=codes)
    np.maximum(codes, low, out=codes)
    np.minimum(codes, low + span, out=codes)


def _load(part: Floats, work: Floats) -> None:
    """Copies [rows, columns] to [block_size, rows * blocks], the last block of each row padded with zeros."""
    (rows, columns), block_size = part.shape, work.shape[0]
    whole, rest = divmod(columns, block_size)
    target = work.reshape(block_size, rows, -1)
    target[:, :, :whole] = part[:, : whole * block_size].reshape(rows, whole, block_size).transpose(2, 0, 1)
    if rest:
        target[:rest, :, whole] = part[:, whole * block_size :].T
        target[rest:, :, whole] = 0


def _normalize(weights: Floats, name: str) -> tuple[NDArray[np.int32], tuple[Floats, Floats]]:
    """Divides every block by a power of two, which is exact, to keep squares in range; returns the exponents, and the
    blocks' lowest and highest values afterwards."""
    low_end, high_end = weights.min(axis=0), weights.max(axis=0)
    largest = np.maximum(high_end, -low_end)
    if not np.isfinite(largest).all():
        raise WeightError(
            "the weight holds NaN or infinite values", where=name, remedy="Check the checkpoint, or download it again"
        )
    if (largest > LARGEST_WEIGHT).any():
        raise QuantizationError(
            f"the weight holds magnitudes up to {largest.max():.3g}",
            where=name,
            remedy="Check the checkpoint: such values overflow float32 arithmetic",
        )
    # not below -126, so that the factor itself stays in float32's range
    exponent: NDArray[np.int32] = np.maximum(np.frexp(largest)[1], -126)
    factor = np.ldexp(np.float32(1), -exponent)
    np.multiply(weights, factor, out=weights)
    return exponent, (low_end * factor, high_end * factor)


def _quantize(chunk: _Chunk, fmt: BlockFormat, low_end: Floats, high_end: Floats) -> tuple[Floats, Floats]:
    """Leaves the best codes in the chunk; returns scales and low codes, both [blocks].

    Args:
        low_end, high_end: lowest and highest values, [blocks].
    """
    low_end, high_end = np.minimum(low_end, np.float32(0)), np.maximum(high_end, np.float32(0))
    spread = high_end - low_end
    middle = np.full_like(spread, -fmt.default_zero_point)
    if fmt.bits == 8:
        scale, low = np.divide(np.maximum(high_end, -low_end), np.float32(127)), middle
        if not fmt.symmetric:
            wide = np.divide(spread, chunk.span)
            wide_low = _balanced_low(low_end, wide, 255.0, chunk.span)
            worse = chunk.error(wide, wide_low) >= chunk.error(scale, low)
            scale, low = np.where(worse, scale, wide), np.where(worse, low, wide_low)
        return chunk.refit(scale, low), low

    extreme = np.where(high_end > -low_end, high_end, low_end)
    # an asymmetric weight on a symmetric grid must come back too: the first divisor does it
    for divisor in DIVISORS if fmt.symmetric else DIVISORS[:1]:
        chunk.consider(np.divide(extreme, np.float32(-divisor)), middle)
    if not fmt.symmetric:
        chunk.flip_negative_scales()
        for steps in STEPS if fmt.block_size <= LARGEST_CLIPPED_BLOCK else STEPS_WITHOUT_CLIPPING:
            scale = np.divide(spread, np.float32(steps))
            chunk.consider(scale, _balanced_low(low_end, scale, steps, chunk.span))
    chunk.consider(chunk.best_fit.copy(), chunk.best_low.copy())
    return chunk.refit(chunk.best_scale, chunk.best_low), chunk.best_low


def _quantize_by(
    importance: Floats, chunk: _Chunk, fmt: BlockFormat, low_end: Floats, high_end: Floats
) -> tuple[Floats, Floats]:
    """As `_quantize` for 4 bits, errors weighted; begins with what that finds, so no block is worse for it.

    Args:
        importance: [block_size, blocks of a row].
    """
    _quantize(chunk, fmt, low_end, high_end)
    weighted = chunk.weighted(importance)
    weighted.consider(chunk.best_scale, chunk.best_low)
    if not fmt.symmetric:
        low_end, high_end = np.minimum(low_end, np.float32(0)), np.maximum(high_end, np.float32(0))
        for steps in STEPS_BY_IMPORTANCE:
            scale = np.divide(high_end - low_end, np.float32(steps))
            weighted.consider(scale, _balanced_low(low_end, scale, steps, chunk.span))
    for _ in range(SEARCHES_BY_IMPORTANCE):
        scale, low = weighted.best_fit.copy(), weighted.best_low.copy()
        weighted.consider(scale, low)
        if not fmt.symmetric:
            for moved in (low - 1, low + 1):
                weighted.consider(scale, np.clip(moved, -chunk.span, np.float32(0)))
    return weighted.refit(weighted.best_scale, weighted.best_low), weighted.best_low


def _store_coarse_scales(chunk: _Chunk, scale: Floats, low: Floats, exponent: NDArray[np.int32]) -> None:
    """Move scales [blocks] that float16 holds coarsely to one of the two steps next to them, and round anew."""
    coarse = np.flatnonzero(is_coarse(scale))
    if not coarse.size:
        return
    weights, part_low = np.ascontiguousarray(chunk.weights[:, coarse]), low[coarse]
    below = np.floor(np.abs(scale[coarse]) / STEP)
    best: Floats | None = None
    for steps in (below + np.float32(1), below):
        # no block loses its scale: one step is the smallest there is
        candidate = np.copysign(np.maximum(steps, np.float32(1)) * STEP, scale[coarse])
        codes = np.empty_like(weights)
        normalized = np.ldexp(candidate, -exponent[coarse])
        _round(weights, normalized, part_low, chunk.span, codes)
        left = weights - codes * normalized
        error = column_dots(left, left)
        better = np.ones(len(error), np.bool_) if best is None else error < best
        best = error if best is None else np.minimum(best, error)
        chunk.codes[:, coarse[better]] = codes[:, better]
        scale[coarse[better]] = candidate[better]


def _balanced_low(low_end: Floats, scale: Floats, steps: float, span: np.float32) -> Floats:
    """The low code that clips as much of a block's low end as of its high end when `steps` is more than the span."""
    ideal = np.divide(low_end, scale, out=np.zeros_like(scale), where=scale != 0) + np.float32((steps - span) / 2)
    low: Floats = np.clip(np.rint(ideal), -span, np.float32(0))
    return low


def _squares(codes: Floats) -> Floats:
    """Per-block sums of squared codes: integers up to 256 * 255**2, which float32 adds exactly in any order."""
    result: Floats = np.einsum("ij,ij->j", codes, codes)
    return result


class _RoundToNearest:
    """Rounding as a quantizer: every format, and nothing to calibrate."""

    name = "rtn"
    title = "rounded to nearest"
    needs_inputs = False
    needs_importance = False

    def writes(self, fmt: Format) -> bool:
        return True

    def describe(self, fmt: Format) -> str:
        if isinstance(fmt, BlockFormat):
            return "round to nearest, scale searched"
        if isinstance(fmt, LpbqFormat):
            return "round to nearest, scale searched, scales of two levels"
        return "round to nearest"

    def quantize(
        self, weight: Floats, fmt: Format, statistics: Statistics | None, *, name: str, half_scales: bool
    ) -> StoredWeight:
        if isinstance(fmt, BlockFormat):
            return round_to_nearest(weight, fmt, name, half_scales=half_scales)
        if isinstance(fmt, LpbqFormat):
            return quantize_lpbq(weight, fmt, name=name)
        return quantize_rows(weight, name=name)


RTN = _RoundToNearest()
