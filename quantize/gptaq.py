"""What a linear layer should be when its inputs are no longer those of the float model.

The layers before it are quantized, so it sees A instead of X. Least squares asks for the weight V that makes
||X W^T - A V^T||^2 smallest, V^T = W^T + (A^T A)^-1 A^T (X - A) W^T, and GPTQ then rounds V in place of W: later layers
take back part of what earlier ones did (Li et al. 2025, "GPTAQ", arXiv 2504.02692). Damping keeps calibration's chance
correlations out, and so does going a part of the way only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import QuantizationError
from edgephi.quantize.cholesky import factor, solve
from edgephi.quantize.workers import multiply, worker_pool

Floats = NDArray[np.float32]

STRENGTH = 0.5
"""How much of the way from W to V is gone."""
DAMPING = 0.1
"""Added to the diagonal of the Hessian, as a fraction of its mean."""
ROWS = 1024
"""Of the weight, solved for together by one thread."""


def compensate(
    weight: Floats,
    hessian: Floats,
    cross: Floats,
    *,
    strength: float = STRENGTH,
    damping: float = DAMPING,
    name: str = "weight",
) -> Floats:
    """The weight to quantize, float32 [rows, columns].

    Args:
        weight: W, float32 [rows, columns].
        hessian: A^T A, float32 [columns, columns].
        cross: A^T (X - A), float32 [columns, columns].
        strength: 0 gives W, 1 gives V.
        damping: fraction of the mean of the Hessian's diagonal that is added to it.
        name: the weight's name for error messages.

    Raises:
        QuantizationError: the damped Hessian has no inverse.
    """
    mean = float(np.trace(hessian, dtype=np.float64)) / len(hessian)
    if mean == 0 or not cross.any():
        return weight
    lower = hessian.copy()
    lower[np.diag_indices_from(lower)] += np.float32(damping * mean)
    found = np.empty_like(weight)
    with worker_pool() as pool:
        try:
            inverses = factor(pool, lower)
        except np.linalg.LinAlgError as error:
            raise QuantizationError(
                "the Hessian has no inverse", where=name, remedy="Calibrate with more text, or with other text"
            ) from error

        def piece(start: int) -> None:
            part = weight[start : start + ROWS]
            change = multiply(cross, np.ascontiguousarray(part.T))
            solve(lower, inverses, change)
            change *= np.float32(strength)
            np.add(part, change.T, out=found[start : start + ROWS])

        list(pool.map(piece, range(0, len(weight), ROWS)))
    return found
