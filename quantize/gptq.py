"""GPTQ: rounding whose error is passed on to the weights that are still to be rounded.

A linear layer with inputs X errs by ||X (W - Q)^T||^2 = sum of e H e^T over the rows e of W - Q, with H = X^T X. Let
H = (I + U) D (I + U)^T with U strictly upper triangular and D diagonal; then that is the sum over columns j of
D_j (t_j - q_j)^2, where t_j = w_j + e_{before j} U_{before j, j} is fixed once the columns before j are. Rounding t_j
instead of w_j is GPTQ (Frantar et al. 2022, arXiv 2210.17323), written as in Chee et al. 2023 ("QuIP", 2307.13304,
theorem 6), which needs one Cholesky factor of H and no inverse.

Scale, zero point and codes of a block: `quantize/gptq_block.py`. What was found is then improved: `quantize/refine.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import QuantizationError, WeightError
from edgephi.quantize.cholesky import factor
from edgephi.quantize.formats import BlockFormat, QuantizedWeight, pack_nibbles
from edgephi.quantize.gptq_block import BlockLoss, Grid, blocks_together, fit_block, search_grid
from edgephi.quantize.lpbq import LpbqFormat, LpbqWeight, quantize_lpbq
from edgephi.quantize.quantizer import Format, Statistics, StoredWeight
from edgephi.quantize.refine import refine
from edgephi.quantize.workers import multiply, worker_pool

Floats = NDArray[np.float32]
Order = list[NDArray[np.int64]]

DAMPING = 0.1
"""Added to the diagonal of the Hessian, as a fraction of its mean: what calibration did not see shall not count 0."""
PASSES = 1
"""Over all codes, by `refine`. SmolLM2 with its channels rescaled, 4,088 predictions of WikiText-2: KL divergence 0.170
without, 0.160 with one, 0.165 with two and 0.162 with four, each of which takes as long as GPTQ itself."""

ROWS = 512
"""Rows that one thread works on together: 16 MB for each of its arrays at 8,192 columns."""

LARGEST_WEIGHT = float(2.0**60)


def gptq(
    weight: Floats,
    hessian: Floats,
    fmt: BlockFormat,
    *,
    damping: float = DAMPING,
    passes: int = PASSES,
    name: str = "weight",
    half_scales: bool = False,
) -> QuantizedWeight:
    """Quantize a linear layer's weight so that its output on the calibration inputs changes least.

    Blocks of columns are taken in the order of their mass on the Hessian's diagonal, and so are the columns within a
    block; codes are stored in place. Columns whose input was always 0 are rounded to nearest.

    The result does not depend on the number of threads, neither BLAS's nor the ones it works with. Besides the result
    this needs about 12 bytes for each element of the Hessian, and for each thread 20 for each element of 512 rows.

    Args:
        weight: float32 [rows, columns].
        hessian: X^T X of the layer's inputs X [tokens, columns], float32 or float64 [columns, columns], symmetric.
        fmt: the format to store, of 4 bits.
        damping: fraction of the mean of the diagonal that is added to it.
        passes: of coordinate descent over the codes; 0 leaves what GPTQ gives.
        name: the weight's name for error messages.
        half_scales: scales will be stored in float16; codes are then chosen for what that leaves of very small ones.

    Raises:
        WeightError: weight or Hessian have the wrong shape or dtype, or hold NaN or an infinity.
        QuantizationError: not 4 bits, magnitudes beyond 2**60, or a Hessian that is not positive after damping.
    """
    _check(weight, hessian, fmt, name)
    rows, columns = weight.shape
    blocks = fmt.blocks(columns)
    codes = np.full((rows, blocks * fmt.block_size), fmt.default_zero_point, np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.full((rows, blocks), fmt.default_zero_point, np.uint8)

    def take(part: slice, found: Floats, grids: list[Grid]) -> None:
        for number, grid in enumerate(grids):
            block = slice(number * fmt.block_size, min((number + 1) * fmt.block_size, columns))
            codes[part, block] = (found[block] - grid.low).T
            scales[part, number], zeros[part, number] = grid.scale, -grid.low

    _fit(weight, hessian, fmt, damping, passes, name, take, half=half_scales)
    packed = pack_nibbles(codes.reshape(rows, blocks, fmt.block_size))
    return QuantizedWeight(fmt, columns, packed, scales, None if fmt.symmetric else pack_nibbles(zeros))


def gptq_lpbq(
    weight: Floats,
    hessian: Floats,
    fmt: LpbqFormat,
    *,
    damping: float = DAMPING,
    passes: int = PASSES,
    name: str = "weight",
) -> LpbqWeight:
    """As `gptq`, with block scales that are 1 to 16 times one scale a row.

    The scales of rows are those that rounding to nearest finds; a block's scale moves in steps of its row's.

    Raises:
        WeightError, QuantizationError: as `gptq`, and rows that are not whole blocks.
    """
    symmetric = BlockFormat(4, fmt.block_size, symmetric=True)
    _check(weight, hessian, symmetric, name)
    rounded = quantize_lpbq(weight, fmt, name=name)
    codes, block_scales, channels = rounded.codes, rounded.block_scales, rounded.channel_scales

    def take(part: slice, found: Floats, grids: list[Grid]) -> None:
        codes[part] = found.T
        for number, grid in enumerate(grids):
            block_scales[part, number] = np.rint(grid.scale / channels[part])

    _fit(weight, hessian, symmetric, damping, passes, name, take, channels)
    return LpbqWeight(codes, block_scales, channels)


def _fit(
    weight: Floats,
    hessian: Floats,
    fmt: BlockFormat,
    damping: float,
    passes: int,
    name: str,
    take: Callable[[slice, Floats, list[Grid]], None],
    units: Floats | None = None,
    *,
    half: bool = False,
) -> None:
    """Fit all rows; rows do not know of each other, so that threads work on pieces of them.

    Args:
        take: given rows of the weight, their codes minus zero point [columns, rows], and the grid of every block; by
            several threads, each for rows of its own.
        units: of block scales, float32 [rows]; see `Grid`.
        half: see `Grid`.
    """
    rows, columns = weight.shape
    mean = float(np.trace(hessian, dtype=np.float64)) / columns
    added = damping * mean if mean > 0 else 1.0
    order = _block_order(np.diagonal(hessian), fmt.block_size)
    span, more = np.float32(fmt.largest_code), np.float32(added)
    with worker_pool() as pool:
        upper, variance = _factor(pool, hessian, np.concatenate(order), added, name)
        single = hessian.astype(np.float32, copy=False)

        def piece(start: int) -> None:
            part = slice(start, min(start + ROWS, rows))
            unit = None if units is None else units[part]
            found, error, grids = _quantize_rows(weight[part], order, upper, variance, fmt, unit, half=half)
            for _ in range(passes):
                refine(error, found, grids, single, more, fmt.block_size, span)
            take(part, found, grids)

        list(pool.map(piece, range(0, rows, ROWS)))


def _check(weight: Floats, hessian: NDArray[np.floating], fmt: BlockFormat, name: str) -> None:
    if fmt.bits != 4:
        raise QuantizationError("GPTQ makes 4-bit weights", where=name, remedy="Round 8-bit weights to nearest")
    if weight.ndim != 2 or weight.dtype != np.float32 or weight.size == 0:
        raise WeightError(
            f"expected a float32 matrix, got {weight.dtype} {list(weight.shape)}",
            where=name,
            remedy="Pass [rows, columns] as float32",
        )
    if hessian.shape != (weight.shape[1],) * 2 or hessian.dtype not in (np.float32, np.float64):
        raise WeightError(
            f"the Hessian is {hessian.dtype} {list(hessian.shape)}, the weight has {weight.shape[1]} columns",
            where=name,
            remedy="Pass [columns, columns] as float32 or float64",
        )
    for values, what in ((weight, "weight"), (hessian, "Hessian")):
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise WeightError(
                f"the {what} holds NaN or infinite values",
                where=name,
                remedy="Check the checkpoint, or download it again",
            )
    if max(weight.max(), -weight.min()) > LARGEST_WEIGHT:
        raise QuantizationError(
            "the weight holds magnitudes beyond 2**60",
            where=name,
            remedy="Check the checkpoint: such values overflow float32 arithmetic",
        )


def _block_order(diagonal: NDArray[np.floating], block_size: int) -> Order:
    """Columns of every block, most important first; blocks likewise. A block's number is its first column's."""
    starts = range(0, len(diagonal), block_size)
    blocks = [start + np.argsort(-diagonal[start : start + block_size], kind="stable") for start in starts]
    return sorted(blocks, key=lambda block: -float(diagonal[block].sum()))


def _factor(
    pool: ThreadPoolExecutor, hessian: Floats, order: NDArray[np.int64], damping: float, name: str
) -> tuple[Floats, Floats]:
    """U (strictly upper triangular) and D of the damped Hessian with its columns in the given order."""
    # the Cholesky factor of the reversed matrix, reversed, is upper triangular
    backwards = order[::-1]
    # in float32: damping is far above its rounding, and a wide layer's Hessian is what takes most memory
    lower = np.ascontiguousarray(hessian[np.ix_(backwards, backwards)], np.float32)
    lower[np.diag_indices_from(lower)] += np.float32(damping)
    try:
        factor(pool, lower)
    except np.linalg.LinAlgError as error:
        raise QuantizationError(
            "the Hessian is not positive definite", where=name, remedy="Calibrate with more text, or with other text"
        ) from error
    diagonal = np.diagonal(lower).copy()
    np.fill_diagonal(lower, 0)
    lower /= diagonal
    _reverse(lower.reshape(-1))
    return lower, np.square(diagonal / diagonal.max())[::-1]


def _reverse(values: Floats) -> None:
    """In place: both axes of a matrix when it is given as a vector."""
    half, step = len(values) // 2, 1 << 20
    for start in range(0, half, step):
        stop = min(start + step, half)
        front = values[start:stop].copy()
        back = values[len(values) - stop : len(values) - start]
        values[start:stop] = back[::-1]
        back[...] = front[::-1]


def _quantize_rows(
    weight: Floats,
    order: Order,
    upper: Floats,
    variance: Floats,
    fmt: BlockFormat,
    unit: Floats | None,
    *,
    half: bool,
) -> tuple[Floats, Floats, list[Grid]]:
    """Codes minus zero point and errors, [columns, rows] in the weight's order, and the grid of every block."""
    rows, columns = weight.shape
    codes, error = np.empty((2, columns, rows), np.float32)
    passed_on = np.empty((columns, rows), np.float32)  # the errors again, in the order they were made
    grids: list[Grid] = [Grid(np.zeros(0, np.float32), np.zeros(0, np.float32))] * len(order)
    done = together = 0
    passed: Floats = np.zeros((0, rows), np.float32)
    for number, block in enumerate(order):
        stop = done + len(block)
        if number % blocks_together(fmt.block_size) == 0:
            # what the errors so far pass on to several blocks: a product of few rows runs at half the speed
            together = done
            last = together + sum(map(len, order[number : number + blocks_together(fmt.block_size)]))
            if together:
                passed = multiply(upper[:together, together:last], passed_on[:together], transposed=True)
            else:
                passed = np.zeros((last, rows), np.float32)
        original = np.ascontiguousarray(weight[:, block].T)
        target = original + passed[done - together : stop - together]
        if done > together:
            target += upper[together:done, done:stop].T @ passed_on[together:done]
        loss = BlockLoss(variance[done:stop], upper[done:stop, done:stop])
        grid = search_grid(target, loss, fmt, unit, half=half)
        found = fit_block(original, target, loss, grid, np.float32(fmt.largest_code))
        codes[block] = found
        error[block] = passed_on[done:stop] = original - found * grid.scale
        grids[int(block.min()) // fmt.block_size] = grid
        done = stop
    return codes, error, grids


class _Gptq:
    """GPTQ as a quantizer: 4 bits, fitted to the inputs."""

    name = "gptq"
    title = "GPTQ"
    needs_inputs = True
    needs_importance = False

    def writes(self, fmt: Format) -> bool:
        return isinstance(fmt, LpbqFormat) or (isinstance(fmt, BlockFormat) and fmt.bits == 4)

    def describe(self, fmt: Format) -> str:
        return "GPTQ, scales of two levels" if isinstance(fmt, LpbqFormat) else "GPTQ"

    def quantize(
        self, weight: Floats, fmt: Format, statistics: Statistics | None, *, name: str, half_scales: bool
    ) -> StoredWeight:
        if statistics is None or statistics.hessian is None:
            raise QuantizationError(
                "GPTQ needs to know the inputs of a layer", where=name, remedy="Pass statistics of calibration text"
            )
        if isinstance(fmt, LpbqFormat):
            return gptq_lpbq(weight, statistics.hessian, fmt, name=name)
        if isinstance(fmt, BlockFormat):
            return gptq(weight, statistics.hessian, fmt, name=name, half_scales=half_scales)
        raise QuantizationError("GPTQ makes 4-bit weights", where=name, remedy="Round 8-bit weights to nearest")


GPTQ = _Gptq()
