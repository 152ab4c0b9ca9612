"""Formats under a budget: what the greedy walk along convex hulls promises, held against every combination."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from edgephi.quantize.allocate import StorageOption, allocate
from edgephi.quantize.formats import BlockFormat

FOUR, EIGHT = BlockFormat(4, 32, False), BlockFormat(8, 32, True)


def total(chosen: dict[str, StorageOption]) -> tuple[int, float]:
    return sum(choice.bytes for choice in chosen.values()), sum(choice.error for choice in chosen.values())


def best(choices: dict[str, list[StorageOption]], budget: int) -> float:
    """The smallest error of all combinations that fit."""
    errors = [
        sum(choice.error for choice in combination)
        for combination in product(*choices.values())
        if sum(choice.bytes for choice in combination) <= budget
    ]
    return min(errors)


def table(seed: int) -> dict[str, list[StorageOption]]:
    """Five weights with four formats each; some formats are larger and worse than others of the same weight."""
    rng = np.random.default_rng(seed)
    return {
        f"w{number}": [
            StorageOption(FOUR, int(size), float(error))
            for size, error in zip(rng.integers(10, 100, 4), rng.exponential(size=4), strict=True)
        ]
        for number in range(5)
    }


@pytest.mark.parametrize("seed", range(8))
def test_no_combination_of_the_same_size_errs_less_as_long_as_every_step_fits(seed: int) -> None:
    choices = table(seed)
    least = sum(min(choice.bytes for choice in each) for each in choices.values())
    most = sum(max(choice.bytes for choice in each) for each in choices.values())
    exact = 0
    for budget in range(least, most + 1):
        used, error = total(allocate(choices, budget))
        assert used <= budget
        optimum = best(choices, budget)
        assert error >= optimum - 1e-12
        # what was taken before the first step that did not fit, of 90 bytes at most, was optimal for its size
        assert error <= best(choices, max(least, budget - 90)) + 1e-12
        exact += abs(error - optimum) < 1e-12
    assert exact > (most - least) / 2


def test_the_step_that_saves_most_per_byte_comes_first() -> None:
    choices = {
        "a": [StorageOption(FOUR, 100, 1.0), StorageOption(EIGHT, 200, 0.0)],
        "b": [StorageOption(FOUR, 10, 0.5), StorageOption(EIGHT, 20, 0.0)],
    }
    assert total(allocate(choices, 209)) == (120, 1.0)
    assert total(allocate(choices, 219)) == (120, 1.0)
    assert total(allocate(choices, 220)) == (220, 0.0)


def test_what_a_large_step_leaves_goes_to_smaller_ones() -> None:
    choices = {
        "large": [StorageOption(FOUR, 100, 9.0), StorageOption(EIGHT, 200, 0.0)],
        "small": [StorageOption(FOUR, 10, 0.5), StorageOption(EIGHT, 20, 0.0)],
    }
    assert total(allocate(choices, 120)) == (120, 9.0)


def test_a_larger_format_that_errs_more_is_never_taken() -> None:
    choices = {"w": [StorageOption(FOUR, 10, 1.0), StorageOption(EIGHT, 12, 2.0)]}
    assert allocate(choices, 1000)["w"].format == FOUR


def test_ties_are_broken_by_name_not_by_order() -> None:
    each = [StorageOption(FOUR, 10, 1.0), StorageOption(EIGHT, 20, 0.0)]
    forwards, backwards = {"a": each, "b": each}, {"b": each, "a": each}
    assert allocate(forwards, 30)["a"].format == allocate(backwards, 30)["a"].format == EIGHT


def test_less_than_the_smallest_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 bytes more"):
        allocate({"w": [StorageOption(FOUR, 10, 1.0)]}, 9)
