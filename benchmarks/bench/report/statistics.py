"""Is it slower, or is it noise? Rank statistics on repetitions; nothing is assumed about their distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
"""Permutations behind a p value, the observed one included."""


@dataclass(frozen=True)
class Shift:
    """How a second sample lies relative to a first."""

    ratio: float
    """Second over first: exp of the Hodges-Lehmann shift of the logarithms (median of all pairwise ratios)."""
    low: float
    high: float
    """Confidence interval of the ratio."""
    confidence: float
    """Of the interval: at least what was asked, or what so few repetitions give at most."""
    p: float
    """Two-sided, exact Mann-Whitney test (Mann and Whitney 1947), ties counted as halves."""
    least_p: float
    """The smallest p that so many repetitions could give."""


def shift(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Shift:
    """Compare two independent samples of positive values.

    The interval inverts the same test (Hollander and Wolfe, Nonparametric Statistical Methods, 4.3): its ends are
    ordered pairwise ratios.
    """
    a, b = np.log(np.asarray(first, dtype=np.float64)), np.log(np.asarray(second, dtype=np.float64))
    pairs = np.sort((b[:, None] - a[None, :]).ravel())
    counts = null_counts(len(a), len(b))
    share = np.cumsum(counts) / counts.sum()  # P(U <= u)
    tail = (1 - confidence) / 2
    reach = int(np.searchsorted(share, tail, side="right"))  # largest r with P(U < r) <= tail
    u = float((pairs > 0).sum() + 0.5 * (pairs == 0).sum())
    extreme = int(np.floor(min(u, len(pairs) - u)))
    outside = float(share[reach - 1]) if reach else 0.0
    low, high = (pairs[reach - 1], pairs[len(pairs) - reach]) if reach else (pairs[0], pairs[-1])
    held = 1 - 2 * (outside if reach else float(share[0]))
    return Shift(
        ratio=float(np.exp(np.median(pairs))),
        low=float(np.exp(low)),
        high=float(np.exp(high)),
        confidence=held,
        p=float(min(1.0, 2 * share[extreme])),
        least_p=float(min(1.0, 2 * share[0])),
    )


@cache
def null_counts(n: int, m: int) -> NDArray[np.float64]:
    """How many of the C(n + m, n) orders of two samples give U = 0, 1, … n·m (the Gaussian binomial coefficients)."""
    counts = np.zeros(n * m + 1)
    counts[0] = 1
    for k in range(1, n + 1):
        # times (1 - q^(m + k)), over (1 - q^k)
        counts[m + k :] -= counts[: max(0, len(counts) - m - k)].copy()
        for start in range(k):
            counts[start::k] = np.cumsum(counts[start::k])
    counts.setflags(write=False)
    return counts


def stratified_p(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], *, draws: int = DRAWS - 1, seed: int = 0
) -> float:
    """Two-sided p that nothing changed in any of several cases, labels permuted within each (van Elteren 1960).

    The statistic is the sum over cases of the difference of mean ranks, each divided by the number of repetitions.
    """
    rng = np.random.default_rng(seed)
    observed, drawn = 0.0, np.zeros(draws)
    for first, second in pairs:
        n, m = len(first), len(second)
        ranks = mid_ranks(np.concatenate([np.asarray(first, float), np.asarray(second, float)])) / (n + m)
        observed += float(ranks[n:].mean() - ranks[:n].mean())
        shuffled = rng.permuted(np.broadcast_to(ranks, (draws, n + m)), axis=1)
        drawn += shuffled[:, n:].mean(axis=1) - shuffled[:, :n].mean(axis=1)
    beyond = int((np.abs(drawn) >= abs(observed) - 1e-12).sum())
    return (1 + beyond) / (1 + draws)


def mid_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: NDArray[np.float64] = last - (counts - 1) / 2
    return middle[inverse]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjustment for asking several questions at once."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]
