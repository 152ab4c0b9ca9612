"""Which weight gets how many bits, when all of them together may take so many bytes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgephi.quantize.formats import BlockFormat


@dataclass(frozen=True)
class StorageOption:
    """One way to store a weight, what it takes, and the error it causes; errors of different weights add up."""

    format: BlockFormat
    bytes: int
    error: float


def allocate(choices: Mapping[str, Sequence[StorageOption]], budget: int) -> dict[str, StorageOption]:
    """Choose one way for every weight, so that together they take at most `budget` bytes and err little.

    Every weight starts at its smallest choice and climbs the lower convex hull of its (bytes, error) points; the step
    that saves the most error per byte is taken first. As long as every step fits, no other choice of the same size errs
    less (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). When one no longer
    fits, its weight stays where it is, and smaller steps of other weights use what is left.

    Args:
        choices: by weight; at least one each.
        budget: at least the smallest choices' bytes.

    Returns:
        The choice of every weight, the same for the same arguments whatever the machine.

    Raises:
        ValueError: the smallest choices take more than the budget.
    """
    hulls = {name: lower_hull(points) for name, points in choices.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice.bytes for choice in chosen.values())
    if left < 0:
        raise ValueError(f"the smallest choices take {-left} bytes more than the budget")
    steps = [(-_gain(hull[0], hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, rung = heapq.heappop(steps)
        hull = hulls[name]
        more = hull[rung].bytes - hull[rung - 1].bytes
        if more > left:
            continue
        chosen[name], left = hull[rung], left - more
        if rung + 1 < len(hull):
            heapq.heappush(steps, (-_gain(hull[rung], hull[rung + 1]), name, rung + 1))
    return chosen


def lower_hull(points: Sequence[StorageOption]) -> list[StorageOption]:
    """The choices on the lower convex hull, from the smallest on; each errs less than the one before."""
    hull: list[StorageOption] = []
    for point in sorted(points, key=lambda choice: (choice.bytes, choice.error)):
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(before: StorageOption, after: StorageOption) -> float:
    """Error saved per byte; `after` is larger."""
    return (before.error - after.error) / (after.bytes - before.bytes)
