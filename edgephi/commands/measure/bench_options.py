"""Times, lists of numbers and labels as options of `edgephi bench`."""

from __future__ import annotations

import re

from edgephi.errors import UsageError

LONGEST_LABEL = 120
MOST_THREADS = 1024


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


def threads_of(text: str | None) -> list[int]:
    """As `numbers_of` for -t, each from 1 to MOST_THREADS.

    Raises:
        UsageError: one is not.
    """
    found = numbers_of("-t", text)
    if found and not 1 <= min(found) <= max(found) <= MOST_THREADS:
        raise UsageError(f"-t is {text!r}", remedy=f"Give numbers of threads from 1 to {MOST_THREADS:,}")
    return found


def checked_label(text: str | None) -> str | None:
    """A label that a report can hold; nothing for an empty one.

    Raises:
        UsageError: it is too long, or no text that can be written as UTF-8.
    """
    if text is not None and len(text) > LONGEST_LABEL:
        raise UsageError(f"--label has {len(text):,} characters", remedy=f"Give {LONGEST_LABEL} at most")
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise UsageError("--label is no text in UTF-8", remedy="Give another") from None
    return text or None
