"""Times and lists of numbers as options of `edgephi bench`."""

from __future__ import annotations

import re

from edgephi.errors import UsageError


def seconds_of(option: str, text: str) -> float:
    """90s, 10m, 1h or a number of seconds.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{option} is {text!r}", remedy="Give a time, as 90s, 10m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def numbers_of(option: str, text: str | None) -> list[int]:
    """'128,512' → [128, 512]; nothing for None; a number that is there twice counts once.

    Raises:
        UsageError: it is no list of numbers.
    """
    if text is None:
        return []
    if not re.fullmatch(r"\d{1,7}(\s*,\s*\d{1,7})*", text.strip()):
        raise UsageError(f"{option} is {text!r}", remedy=f"Give numbers with commas between, as {option} 128,512")
    return list(dict.fromkeys(int(part) for part in text.split(",")))
