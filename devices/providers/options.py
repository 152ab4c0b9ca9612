"""Which options an execution provider knows, and which values they take.

onnxruntime hands options to providers as strings. Providers accept misspelt names and impossible values without a word
(QNN 2.7.0: `htp_arch=999`), so what reaches them is checked here first. Options that name a library to load or carry a
pointer (QNN's `backend_path` and `op_packages`, WebGPU's `webgpuDevice`) are left out of the tables: a profile may be a
stranger's. Every name of QNN's, WebGPU's and OpenVINO's tables occurs in the library of the wheel that edgephi pins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from edgephi.errors import DeviceError


@dataclass(frozen=True)
class OneOf:
    """A value out of a list, spelt exactly so."""

    values: tuple[str, ...]

    def accepts(self, value: str) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(self.values)


@dataclass(frozen=True)
class Whole:
    """A decimal whole number, bounds included."""

    low: int
    high: int

    def accepts(self, value: str) -> bool:
        return value.isascii() and value.isdigit() and len(value) < 20 and self.low <= int(value) <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class FilePath:
    """A path; one that is read has to exist, one that is written need not."""

    exists: bool

    def accepts(self, value: str) -> bool:
        plain = bool(value) and all(ord(c) >= 32 for c in value)
        return plain and (not self.exists or Path(value).is_file())

    def __str__(self) -> str:
        return "a file that exists" if self.exists else "a path"


Allowed = OneOf | Whole | FilePath
SWITCH = OneOf(("0", "1"))
WORD = OneOf(("true", "false"))
DUMP = FilePath(exists=False)
"""Where something is written."""
MANY = 2**31 - 1


def check_against(name: str, known: Mapping[str, Allowed], options: Mapping[str, str], where: object = None) -> None:
    """Hold options against the table of one provider.

    Args:
        name: the provider, for the sentence.
        where: the profile the options come from.

    Raises:
        DeviceError: an option or value the table does not have; step `options`.
    """
    for option, value in options.items():
        allowed = known.get(option)
        if allowed is None:
            near = get_close_matches(option, known, n=1)
            advice = f"Write {near[0]}" if near else f"Leave it out; known are {', '.join(sorted(known)) or 'none'}"
            raise DeviceError(f"{name} has no option {option!r}", where=where, remedy=advice, step="options")
        if not isinstance(value, str) or not allowed.accepts(value):
            raise DeviceError(
                f"{name} takes no {option}={value!r}", where=where, remedy=f"Use {allowed}, as text", step="options"
            )
