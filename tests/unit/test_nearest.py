"""Angles' functions in float32: the nearest numbers there are, whatever NumPy's libraries make of the last bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.export.families.nearest import MARGIN, cos_and_sin, power

Float32 = NDArray[np.float32]

# their cosines lie 11 and 12 units of 2**-53 beside the middle of two float32 numbers; mpmath with 80 digits says
# 0.9656452834606182827612 and -0.9376517236232771231446
HARD = {110476.984375: "0x1.ee691p-1", 52518.359375: "-0x1.e013e4p-1"}


def neighbours(values: Float32) -> tuple[Float32, Float32]:
    return np.nextafter(values, np.float32(-np.inf)), np.nextafter(values, np.float32(np.inf))


def assert_nearest(values: Float32, exact: NDArray[np.float64]) -> None:
    """No neighbour is nearer, by more than float64 can tell."""
    distance = np.abs(values - exact)
    for other in neighbours(values):
        assert (distance <= np.abs(other - exact) + 2.0**-50 * np.maximum(np.abs(exact), 1e-30)).all()


def angles() -> Float32:
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0, 131072, 20000), rng.uniform(0, 1e-2, 2000), 10.0 ** rng.uniform(-30, 6, 2000)
    return np.concatenate(sizes).astype(np.float32)


def test_cosines_and_sines_are_the_nearest() -> None:
    found = angles()
    cos, sin = cos_and_sin(found.reshape(40, -1))
    assert_nearest(cos.ravel(), np.array([math.cos(x) for x in found.tolist()]))
    assert_nearest(sin.ravel(), np.array([math.sin(x) for x in found.tolist()]))


def test_powers_are_the_nearest() -> None:
    exponents = np.arange(0, 96, 2, dtype=np.float32) / np.float32(96)
    for base in (10000.0, 500000.0, 1e30):
        assert_nearest(power(np.float32(base), exponents), float(np.float32(base)) ** exponents.astype(np.float64))


@pytest.mark.parametrize("off", [-MARGIN / 2, MARGIN / 2])
def test_what_a_library_gets_wrong_does_not_show(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = np.concatenate([angles(), np.array([*HARD], np.float32)])
    before = cos_and_sin(found)
    assert [float(x) for x in before[0][-2:]] == [float.fromhex(text) for text in HARD.values()]

    def wrong(function: Callable[..., NDArray[np.float64]]) -> Callable[..., Any]:
        return lambda x, dtype: function(x, dtype=dtype) + off

    monkeypatch.setattr(np, "cos", wrong(np.cos))
    monkeypatch.setattr(np, "sin", wrong(np.sin))
    assert not np.array_equal(np.cos(found, np.float64).astype(np.float32), before[0])
    for wanted, got in zip(before, cos_and_sin(found), strict=True):
        np.testing.assert_array_equal(wanted, got)


def test_the_digits_suffice_for_the_largest_angles() -> None:
    """mpmath with 200 digits: cos and sin of float32's 1e38 and 3.4e38."""
    cos, sin = cos_and_sin(np.array([1e38, 3.4e38, 0], np.float32))
    np.testing.assert_array_equal(cos, np.array([0.14681168, 0.96975386, 1], np.float32))
    np.testing.assert_array_equal(sin, np.array([0.98916447, -0.24408488, 0], np.float32))


def test_powers_beyond_float32_are_infinite_and_of_nothing_zero() -> None:
    exponents = np.array([0, 0.5, 1], np.float32)
    np.testing.assert_array_equal(power(np.float32(np.inf), exponents), np.array([1, np.inf, np.inf], np.float32))
    np.testing.assert_array_equal(power(np.float32(0), exponents), np.array([1, 0, 0], np.float32))
    assert power(np.float32(1e30), np.array([2], np.float32))[0] == np.inf
