"""GPTQ: rounding whose error is passed on to the weights that are still to be rounded.

A linear layer with inputs X errs by ||X (W - Q)^T||^2 = sum of e H e^T over the rows e of W - Q, with H = X^T X. Let
H = (I + U) D (I + U)^T with U strictly upper triangular and D diagonal; then that is the sum over columns j of
D_j (t_j - q_j)^2, where t_j = w_j + e_{before j} U_{before j, j} is fixed once the columns before j are. Rounding t_j
instead of w_j is GPTQ (Frantar et al. 2022, arXiv 2210.17323), written as in Chee et al. 2023 ("QuIP", 2307.13304,
theorem 6), which needs one Cholesky factor of H and no inverse.

The scale and zero point of a block are chosen by what they lead to: every candidate rounds the whole block, passing its
errors on inside it, and the one with the smallest sum of D_j (t_j - q_j)^2 stays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import QuantizationError, WeightError
from edgephi.quantize.formats import BlockFormat, QuantizedWeight, pack_nibbles

Floats = NDArray[np.float32]
Order = list[NDArray[np.int64]]

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a fraction of its mean: what calibration did not see shall not count 0."""

ROWS = 4096
"""Rows that share a matrix product with all earlier errors (100 MB at 3,072 columns)."""
ROWS_IN_SEARCH = 512
"""Rows whose candidates are tried together: with a block of 32 columns, 1 MB."""

# an asymmetric scale divides the block's range into this many steps; codes reach 15, the rest is clipped
STEPS = (13.0, 14.0, 14.5, 15.0, 15.5, 16.0, 17.0, 18.5)
# a symmetric one puts the weight of largest magnitude at minus this code
DIVISORS = (6.5, 7.0, 7.5, 8.0, 8.5, 9.0, 10.0)
# reproduces an asymmetric weight that lies on a symmetric grid
EXACT_DIVISOR = (8.0,)
LARGEST_WEIGHT = float(2.0**60)


def gptq(
    weight: Floats, hessian: Floats, fmt: BlockFormat, *, damping: float = DAMPING, name: str = "weight"
) -> QuantizedWeight:
    """Quantize a linear layer's weight so that its output on the calibration inputs changes least.

    Blocks of columns are taken in the order of their mass on the Hessian's diagonal, and so are the columns within a
    block; codes are stored in place. Columns whose input was always 0 are rounded to nearest.

    Besides the result this needs about 24 bytes for each element of the Hessian, and 200 MB.

    Args:
        weight: float32 [rows, columns].
        hessian: X^T X of the layer's inputs X [tokens, columns], float32 or float64 [columns, columns], symmetric.
        fmt: the format to store, of 4 bits.
        damping: fraction of the mean of the diagonal that is added to it.
        name: the weight's name for error messages.

    Raises:
        WeightError: weight or Hessian have the wrong shape or dtype, or hold NaN or an infinity.
        QuantizationError: not 4 bits, magnitudes beyond 2**60, or a Hessian that is not positive after damping.
    """
    _check(weight, hessian, fmt, name)
    rows, columns = weight.shape
    order = _block_order(np.diagonal(hessian), fmt.block_size)
    upper, variance = _factor(hessian, np.concatenate(order), damping, name)
    blocks = len(order)
    codes = np.full((rows, blocks * fmt.block_size), fmt.default_zero_point, np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.full((rows, blocks), fmt.default_zero_point, np.uint8)
    for start in range(0, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        _quantize_rows(weight[part], order, upper, variance, fmt, codes[part], scales[part], zeros[part])
    packed = pack_nibbles(codes.reshape(rows, blocks, fmt.block_size))
    return QuantizedWeight(fmt, columns, packed, scales, None if fmt.symmetric else pack_nibbles(zeros))


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


def _factor(hessian: Floats, order: NDArray[np.int64], damping: float, name: str) -> tuple[Floats, Floats]:
    """U (strictly upper triangular) and D of the damped Hessian with its columns in the given order, D's mean 1."""
    # the Cholesky factor of the reversed matrix, reversed, is upper triangular
    backwards = order[::-1]
    work = hessian[np.ix_(backwards, backwards)].astype(np.float64)
    mean = float(np.trace(work)) / len(order)
    if mean > 0:
        work /= mean
    work[np.diag_indices_from(work)] += damping if mean > 0 else 1.0
    try:
        lower = np.linalg.cholesky(work)
    except np.linalg.LinAlgError as error:
        raise QuantizationError(
            "the Hessian is not positive definite", where=name, remedy="Calibrate with more text, or with other text"
        ) from error
    del work
    upper = lower[::-1, ::-1]
    diagonal = np.diagonal(upper).copy()
    unit = np.divide(upper, diagonal, dtype=np.float32, casting="same_kind")
    np.fill_diagonal(unit, 0)
    return unit, np.square(diagonal).astype(np.float32)


def _quantize_rows(
    weight: Floats,
    order: Order,
    upper: Floats,
    variance: Floats,
    fmt: BlockFormat,
    codes: NDArray[np.uint8],
    scales: Floats,
    zeros: NDArray[np.uint8],
) -> None:
    """Fill codes [rows, padded columns], scales and zero points [rows, blocks] for some rows of a weight."""
    rows, columns = weight.shape
    # columns in order, each contiguous: what is done to a column is done to all rows
    error = np.empty((columns, rows), np.float32)
    done = 0
    for block in order:
        stop = done + len(block)
        original = np.ascontiguousarray(weight[:, block].T)
        target = original + upper[:done, done:stop].T @ error[:done]
        number = int(block.min()) // fmt.block_size
        inner = upper[done:stop, done:stop]
        for start in range(0, rows, ROWS_IN_SEARCH):
            part = slice(start, min(start + ROWS_IN_SEARCH, rows))
            search = _Block(original[:, part], target[:, part], inner, variance[done:stop], fmt)
            scale, low, chosen = search.best()
            error[done:stop, part] = original[:, part] - chosen * scale
            codes[part, block] = (chosen - low).T
            scales[part, number] = scale
            zeros[part, number] = -low
        done = stop


class _Block:
    """One block of columns of some rows: [columns, rows], and [candidates, rows] for scales and low codes.

    A low code is the code minus zero point of the smallest stored code, i.e. minus the zero point.
    """

    def __init__(self, original: Floats, target: Floats, upper: Floats, variance: Floats, fmt: BlockFormat) -> None:
        self._original, self._target, self._upper, self._variance = original, target, upper, variance
        self._feed = np.ascontiguousarray(upper.T)
        self._span, self._middle, self._symmetric = np.float32(fmt.largest_code), -fmt.default_zero_point, fmt.symmetric

    def best(self) -> tuple[Floats, Floats, Floats]:
        """Scale [rows], low code [rows] and codes minus zero point [columns, rows]."""
        scales, lows = self._candidates()
        loss, codes = self._round(scales, lows)
        choice, each = loss.argmin(axis=0), np.arange(loss.shape[1])
        scale, low, code = scales[choice, each], lows[choice, each], codes[:, choice, each]
        loss = loss[choice, each]
        # the best scale for these codes may lead to other codes, which have their own best scale
        refit = self._refit(scale, code)
        refit_loss, refit_codes = self._round(refit[None], low[None])
        better = refit_loss[0] < loss
        code = np.where(better, refit_codes[:, 0], code)
        return self._refit(np.where(better, refit, scale), code), low, code

    def _candidates(self) -> tuple[Floats, Floats]:
        low_end, high_end = np.minimum(self._target.min(axis=0), 0), np.maximum(self._target.max(axis=0), 0)
        extreme = np.where(high_end > -low_end, high_end, low_end)
        divisors = np.array(DIVISORS if self._symmetric else EXACT_DIVISOR, np.float32)[:, None]
        scales = -extreme / divisors
        lows = np.full_like(scales, self._middle)
        if self._symmetric:
            return scales, lows
        lows = np.where(scales < 0, -(lows + self._span), lows)  # -s with codes -8..7 is s with codes -7..8
        steps = np.array(STEPS, np.float32)[:, None]
        wide = (high_end - low_end) / steps
        ideal = np.divide(low_end, wide, out=np.zeros_like(wide), where=wide != 0) + (steps - self._span) / 2
        wide_lows = np.clip(np.rint(ideal), -self._span, 0)
        return np.concatenate([np.abs(scales), wide]), np.concatenate([lows, wide_lows]).astype(np.float32)

    def _round(self, scales: Floats, lows: Floats) -> tuple[Floats, Floats]:
        """Loss [candidates, rows] and codes minus zero point [columns, candidates, rows]."""
        columns, shape = len(self._target), scales.shape
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
        highs = lows + self._span
        codes = np.empty((columns, *shape), np.float32)
        errors = np.empty((columns, scales.size), np.float32)
        loss = np.zeros(shape, np.float32)
        work = np.empty(shape, np.float32)
        for j in range(columns):
            target = self._target[j]
            if j:
                target = target + (self._feed[j, :j] @ errors[:j]).reshape(shape)
            code = codes[j]
            np.multiply(target, inverse, out=code)
            np.rint(code, out=code)
            np.maximum(code, lows, out=code)
            np.minimum(code, highs, out=code)
            np.multiply(code, scales, out=work)
            np.subtract(self._original[j], work, out=errors[j].reshape(shape))
            np.subtract(target, work, out=work)
            np.square(work, out=work)
            work *= self._variance[j]
            loss += work
        return loss, codes

    def _refit(self, scale: Floats, codes: Floats) -> Floats:
        """The scale that makes the loss of these codes smallest, by linear least squares on what `scale` leaves."""
        passed = codes + self._feed @ codes
        rest = (self._original - codes * scale).astype(np.float32)
        left = (self._target - self._original) + rest + self._feed @ rest
        weighted = passed * self._variance[:, None]
        product, square = np.einsum("ij,ij->j", left, weighted), np.einsum("ij,ij->j", passed, weighted)
        step = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        return np.asarray(scale + step, np.float32)
