"""The state of the machine that a number depends on, besides its power: temperature, throttling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Thermal:
    """Temperature of the hottest zone, and how often the processor throttled itself since it was switched on."""

    hottest_c: float | None
    throttles: int | None


def thermal(root: Path = Path("/")) -> Thermal:
    """Read Linux's thermal zones (millidegrees) and throttle counters; nothing elsewhere."""
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    # readings outside these bounds come from sensors that are switched off
    degrees = [value / 1000 for value in _integers(zones) if -40_000 < value < 150_000]
    counters = list((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    counters += (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/package_throttle_count")
    return Thermal(max(degrees, default=None), sum(_integers(counters)) if counters else None)


def _integers(paths: Iterable[Path]) -> list[int]:
    found = []
    for path in paths:
        try:
            found.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # a zone that is asleep refuses to be read
            continue
    return found
