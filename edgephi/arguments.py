"""Arguments of the Python interface: a value of the wrong type is refused where it comes in, by the argument's name."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Sequence
from numbers import Real
from typing import SupportsIndex

from edgephi.errors import EdgephiError, UsageError

_LONGEST_VALUE = 60
"""Characters of a value that a message shows."""


def wrong(name: str, value: object, wanted: str, error: type[EdgephiError] = UsageError) -> EdgephiError:
    """The error for an argument: its name, its value, and what it has to be."""
    try:
        shown = repr(value)
    except Exception:  # the value's own code failed: its type has to do
        shown = f"of the type {type(value).__name__}"
    cut = shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}…"
    return error(f"{name} is {cut}", remedy=f"Give {wanted}")


def require_text(name: str, value: object, wanted: str, error: type[EdgephiError] = UsageError) -> None:
    """Raises `error` for anything but a text."""
    if not isinstance(value, str):
        raise wrong(name, value, wanted, error)


def require_path(name: str, value: object, wanted: str = "a path, as a text or a pathlib.Path") -> None:
    """Raises UsageError for anything but a text or a path; bytes are neither."""
    if not isinstance(value, str) and not (isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)):
        raise wrong(name, value, wanted)


def require_integer(name: str, value: object) -> int:
    """An integer of Python's; raises UsageError for anything else. NumPy's are integers, True and 2.0 are not."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise wrong(name, value, "an integer")
    try:
        return operator.index(value)
    except TypeError:  # an array of several
        raise wrong(name, value, "an integer") from None


def require_number(name: str, value: object) -> float:
    """A float of Python's; raises UsageError for anything but a real number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise wrong(name, value, "a smaller number") from None


def require_flag(name: str, value: object) -> None:
    """Raises UsageError for anything but True or False."""
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises UsageError for anything but one of the words."""
    if not isinstance(value, str) or value not in choices:
        raise wrong(name, value, f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}")


def require_texts(name: str, value: object, wanted: str) -> None:
    """Raises UsageError for anything but a list (tuple, set) of texts, one at least; a text alone is no list."""
    if isinstance(value, str) or not isinstance(value, Collection) or not value:
        raise wrong(name, value, wanted)
    if not all(isinstance(item, str) for item in value):
        raise wrong(name, value, wanted)
