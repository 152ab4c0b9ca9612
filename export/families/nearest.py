"""Powers, cosines and sines as the nearest float32 numbers, which are the same on every processor.

NumPy computes such functions in float32 with other instructions on other processors, and the last bit differs. In
float64 they differ as well, but by so little that the nearest float32 is nearly always beyond doubt. Where it is not,
decimal arithmetic of many digits decides.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

DIGITS = Context(prec=110)
"""float32's largest number has 39 digits before the point, and an angle of that size still gets 70 behind it."""
PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798214808651"
    "328230664709384460955"
)
SMALLEST_TERM = Decimal("1e-70")
MARGIN = 2.0**-48
"""Eight times what libraries promise for cosines and sines in float64, which is four units of 2**-53."""


def power(base: np.float32, exponents: Float32) -> Float32:
    """base**exponents, float32 [n]; infinity where that is beyond float32."""
    number = Decimal(float(base))
    return np.array([_nearest(DIGITS.power(number, Decimal(float(x))) if x else Decimal(1)) for x in exponents])


def cos_and_sin(angles: Float32) -> tuple[Float32, Float32]:
    """Cosine and sine of angles in radians, each float32 in the angles' shape."""
    return _rounded(np.cos, angles, 1), _rounded(np.sin, angles, 0)


def _rounded(function: Callable[..., NDArray[np.float64]], angles: Float32, quarters: int) -> Float32:
    values = function(angles, dtype=np.float64)
    rounded = values.astype(np.float32)
    doubtful = (values - MARGIN).astype(np.float32) != (values + MARGIN).astype(np.float32)
    for place in np.argwhere(doubtful & np.isfinite(values)):
        index = tuple(place)
        rounded[index] = _nearest(_sine(Decimal(float(angles[index])), quarters))
    return rounded


def _sine(angle: Decimal, quarters: int) -> Decimal:
    """The sine of an angle to which quarter turns are added, by Taylor's series for what is beyond whole quarters."""
    with localcontext(DIGITS):
        turns = (angle / (PI / 2)).to_integral_value()
        rest = angle - turns * (PI / 2)
        quarter = (int(turns) + quarters) % 4
        # what is left takes the series of a cosine or of a sine, whose terms have these powers
        is_cosine = quarter % 2 == 1
        total = term = Decimal(1) if is_cosine else rest
        exponent = 0 if is_cosine else 1
        while abs(term) > SMALLEST_TERM:
            term *= -rest * rest / ((exponent + 1) * (exponent + 2))
            total += term
            exponent += 2
        return -total if quarter >= 2 else total


def _nearest(value: Decimal) -> np.float32:
    """The float32 that is nearest to a number."""
    with np.errstate(over="ignore"):
        rounded = np.float32(float(value))
    if not np.isfinite(rounded):
        return rounded
    # float() rounds to float64, and rounding that again can miss by one
    around = (rounded, np.nextafter(rounded, np.float32(-np.inf)), np.nextafter(rounded, np.float32(np.inf)))
    return min(around, key=lambda number: abs(DIGITS.subtract(Decimal(float(number)), value)))
