"""Factors of channels that cancel out: producers are divided by what their consumers' columns are multiplied by.

Blocks of columns share a scale, so a column that counts much and is small is rounded as coarsely as one that counts
little and is large. With column j multiplied by s_j the error of a block grows with the mean of w^2 s^2 and the mean of
m / s^2, m the inputs' mean square. Their product is smallest for s^4 = m / w^2 (Cauchy and Schwarz). The factors are
folded into the norm before, the rows of v before o, and the rows of up before a gated down: the function stays the same
and costs the same. Lin et al. 2023, "AWQ" (arXiv 2306.00978), scale by m alone.

GPTQ knows from the inputs which errors count, and hands on what it cannot avoid. There only the sizes of columns are
made equal, s = 1 / |w|. SmolLM2 by GPTQ in blocks of 128, KL divergence of 4,088 predictions of WikiText-2 (as
`benchmarks/studies/offgrid.py`): with channels multiplied by random factors 0.19 by the rule above and 0.14 by size;
with channels only in another order 0.18, 0.15, and 0.14 without any factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgephi.export.spec import DecoderSpec

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

Rule = Literal["importance", "size"]
"""What factors follow from: mean squares of inputs and sizes of columns; or the latter alone, for GPTQ."""
MOST = 16.0
"""A channel is not moved by more than this, either way: float16 graphs compute with the result too."""
LEAST = 0.01
"""Of the mean, below which a mean square counts as this much."""


@dataclass(frozen=True)
class Treatment:
    """What a text decided about a weight before it is quantized and stored; None: nothing."""

    mean_squares: Float32 | None = None
    """Of what the weight multiplies once its columns are rescaled, [columns]."""
    columns: Float32 | None = None
    """What columns are multiplied by."""
    rows: Float32 | None = None
    """What rows are multiplied by, or the values of a vector."""

    def apply(self, values: Float32, row: int = 0) -> Float32:
        """Values multiplied: some rows of a matrix from `row` on, or a whole vector."""
        if self.columns is not None:
            values = values * self.columns
        if self.rows is not None:
            rows = self.rows[row : row + len(values)]
            values = values * (rows[:, None] if values.ndim == 2 else rows)
        return values

    def undo(self, values: Float32) -> Float32:
        """A whole matrix as it was."""
        if self.columns is not None:
            values = values / self.columns
        return values if self.rows is None else values / self.rows[:, None]


def rescale_layer(
    spec: DecoderSpec, layer: int, values: Mapping[str, Float32], squares: Mapping[str, Float32], rule: Rule
) -> dict[str, Treatment]:
    """Treatments of one layer's weights, by canonical name, wherever a factor cancels out exactly.

    A norm that two products read, as in a parallel decoder or before experts, stays as it is.

    Args:
        values: the layer's weights, float32.
        squares: mean squares of the inputs, by linear weight.
        rule: what factors follow from.
    """
    base = f"layers.{layer}"
    columns: dict[str, Float64] = {}
    rows: dict[str, Float64] = {}
    qkv, o, down = f"{base}.qkv.weight", f"{base}.o.weight", f"{base}.down.weight"
    first = f"{base}.{'gate_up' if spec.mlp == 'gated_silu' else 'up'}.weight"
    for norm, reader in ((f"{base}.input_norm", qkv), (f"{base}.post_norm", first)):
        if f"{norm}.weight" in values and reader in squares and not spec.parallel:
            columns[reader] = _factors(values[reader], squares[reader], rule)
            for vector in (f"{norm}.weight", f"{norm}.bias"):
                if vector in values:
                    rows[vector] = 1 / columns[reader]
    if o in squares and qkv in values:
        shared = (spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
        factors = np.exp(np.log(_factors(values[o], squares[o], rule)).reshape(shared).mean(axis=1, keepdims=True))
        columns[o] = np.broadcast_to(factors, shared).reshape(-1)
        rows[qkv] = np.concatenate([np.ones(spec.query_size + spec.kv_size), 1 / factors.reshape(-1)])
    if down in squares and spec.mlp == "gated_silu" and first in values:
        columns[down] = _factors(values[down], squares[down], rule)
        rows[first] = np.concatenate([np.ones(len(columns[down])), 1 / columns[down]])
    for weight in (qkv, first):
        bias = weight.replace(".weight", ".bias")
        if weight in rows and bias in values:
            rows[bias] = rows[weight]
    return {
        name: Treatment(None, _single(columns.get(name)), _single(rows.get(name)))
        for name in dict.fromkeys([*columns, *rows])
    }


def _factors(weight: Float32, squares: Float32, rule: Rule) -> Float64:
    """What the columns are to be multiplied by, float64 [columns], 1 in the geometric mean."""
    sizes = np.square(weight, dtype=np.float64).mean(axis=0)
    if not sizes.any():
        return np.ones(len(sizes))
    sizes = np.maximum(sizes / sizes.mean(), LEAST)
    if rule == "size":
        return _clipped(-np.log(sizes) / 2)
    means = squares.astype(np.float64)
    if not means.any():
        return np.ones(len(means))
    # of a channel that the text leaves at zero it says nothing: another text may bring it to the size of any other, and
    # what counts as unimportant is rounded coarsely and grows what it multiplies
    means = np.where(means > 0, means, np.median(means[means > 0]))
    return _clipped(np.log(np.maximum(means / means.mean(), LEAST) / sizes) / 4)


def _clipped(logs: Float64) -> Float64:
    factors: Float64 = np.clip(np.exp(logs - logs.mean()), 1 / MOST, MOST)
    return factors


def _single(factors: Float64 | None) -> Float32 | None:
    return None if factors is None else factors.astype(np.float32)
