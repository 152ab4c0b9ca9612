"""Typed reading of a model's config.json: an unexpected value is an error that names the key, never a warning."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgephi.errors import UnsupportedModelError

SMALLEST, LARGEST = 1.2e-38, 3.4e38
"""Float32's normal numbers: what a graph computes with. Beyond them a value becomes 0 or infinite there."""

_ABSENT = object()
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120


def shown(value: object) -> str:
    """A value for a message: as Python writes it, cut where a stranger's file holds a long or deep one."""
    return _short.repr(value)


@dataclass(frozen=True)
class Config:
    """A JSON object and the name of the file it came from.

    Every reader takes a default for keys that published configurations leave out; without one the key is required.
    A null counts as absent.
    """

    values: Mapping[str, object]
    where: str

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | object = _ABSENT, *, at_most: int = 1 << 24) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
            raise self.refusal(key, value, f"a whole number from 1 to {at_most:,} is needed")
        return value

    def number(self, key: str, default: float | object = _ABSENT) -> float:
        """A finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(key, value, "a number is needed")
        if not -LARGEST <= value <= LARGEST:  # false for NaN as well
            raise self.refusal(key, value, "a finite number is needed")
        return float(value)

    def positive(self, key: str, default: float | object = _ABSENT) -> float:
        """A number above 0 that float32 holds: an epsilon, the base of a rope, a factor."""
        value = self.number(key, default)
        if not value >= SMALLEST:
            raise self.refusal(key, value, "a number above 0 is needed")
        return value

    def boolean(self, key: str, default: bool | object = _ABSENT) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false is needed")
        return value

    def text(self, key: str, default: str | object = _ABSENT) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.refusal(key, value, "a text is needed")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        value = self._get(key, _ABSENT)
        if not isinstance(value, list) or not all(
            isinstance(x, int | float) and not isinstance(x, bool) for x in value
        ):
            raise self.refusal(key, value, "a list of numbers is needed")
        if len(value) != length:
            raise self.refusal(key, f"{len(value)} numbers", f"{length} are needed")
        for number in value:
            if not -LARGEST <= number <= LARGEST:
                raise self.refusal(key, number, "finite numbers are needed")
        return tuple(float(x) for x in value)

    def one_of(self, key: str, allowed: Sequence[str], default: str | object = _ABSENT) -> str:
        value = self.text(key, default)
        if value not in allowed:
            raise self.refusal(key, value, f"edgephi builds {', '.join(allowed)}")
        return value

    def expect(self, key: str, expected: object) -> None:
        """The key is absent, null, or has exactly this value."""
        value = self.values.get(key)
        if value is not None and value != expected:
            raise self.refusal(key, value, f"edgephi builds {expected!r} only")

    def section(self, key: str) -> Config | None:
        """A nested object, or None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refusal(key, value, "an object is needed")
        return Config(value, f"{self.where}, {key}")

    def refusal(self, key: str, value: object, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{key[:120]} is {shown(value)}: {reason}",
            where=self.where,
            remedy="Use a checkpoint of a supported architecture, or correct the file",
        )

    def _get(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _ABSENT:
            raise UnsupportedModelError(
                f"the key {key} is missing",
                where=self.where,
                remedy="Use the configuration that was published with the weights",
            )
        return default
