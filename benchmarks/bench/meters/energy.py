"""Energy meters: what the machine itself counts. Where it counts nothing, nothing is reported.

Linux: RAPL through powercap (Documentation/power/powercap/powercap.rst), else the battery's charge while it discharges
(Documentation/ABI/testing/sysfs-class-power). Windows: see `energy_windows`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Meter:
    """A counter of energy.

    Args:
        source: its name, and what it covers.
        joules: reads it; never falls.
        resolution_j: smallest step.
    """

    source: str
    joules: Callable[[], float]
    resolution_j: float


def find_meter(root: Path = Path("/")) -> Meter | str:
    """The best meter of this machine, or why there is none.

    Args:
        root: where Linux's /sys is found.
    """
    if sys.platform == "win32":
        from edgephi.benchmarks.bench.meters.energy_windows import find_windows_meter

        return find_windows_meter()
    if sys.platform == "linux":
        rapl = find_rapl(root)
        if isinstance(rapl, Meter):
            return rapl
        battery = find_battery(root)
        return battery if isinstance(battery, Meter) else f"{rapl}; {battery}"
    return "no meter is read on this system"


def idle_watts(meter: Meter, seconds: float, sleep: Callable[[float], None] = time.sleep) -> float:
    """Mean power while this process does nothing.

    Args:
        seconds: how long; above 0.
    """
    started, before = time.perf_counter(), meter.joules()
    sleep(seconds)
    return (meter.joules() - before) / (time.perf_counter() - started)


class Unwrapped:
    """The sum of counters that start again at zero after `ranges`."""

    def __init__(self, read: Callable[[], Sequence[int]], ranges: Sequence[int]) -> None:
        self._read = read
        self._ranges = ranges
        self._last = list(read())
        self._total = 0

    def __call__(self) -> int:
        """Units counted since this object was made. At most one turn between two calls is noticed."""
        now = list(self._read())
        for before, after, span in zip(self._last, now, self._ranges, strict=True):
            self._total += after - before + (span if after < before else 0)
        self._last = now
        return self._total


def find_rapl(root: Path) -> Meter | str:
    """Processor packages, and memory where it has a domain of its own; microjoules, a counter that wraps."""
    zones = sorted((root / "sys/class/powercap").glob("*-rapl*:*"))
    wanted = [zone for zone in zones if _name(zone).startswith("package") or _name(zone) == "dram"]
    # the same domain may be listed twice, as memory-mapped and as register interface
    chosen = list({(_name(zone), _parent(zone)): zone for zone in reversed(wanted)}.values())
    if not any(_name(zone).startswith("package") for zone in chosen):
        return "there is no RAPL package domain"
    try:
        counter = Unwrapped(
            lambda: [_integer(zone / "energy_uj") for zone in chosen],
            [_integer(zone / "max_energy_range_uj") for zone in chosen],
        )
    except PermissionError:
        return "RAPL is there, but only root may read its energy_uj"
    except (OSError, ValueError):
        return "RAPL is there but cannot be read"
    names = ", ".join(sorted(_name(zone) for zone in chosen))
    return Meter(f"RAPL: {names}", lambda: counter() / 1e6, 0.001)


def find_battery(root: Path) -> Meter | str:
    """Everything the battery feeds, the screen included; only while it discharges."""
    batteries = [
        path for path in sorted((root / "sys/class/power_supply").glob("*")) if _text(path / "type") == "Battery"
    ]
    batteries = [path for path in batteries if _text(path / "scope") != "Device"]  # a mouse's
    if not batteries:
        return "there is no battery"
    if not any(_text(path / "status") == "Discharging" for path in batteries):
        return "the battery is not discharging"
    try:
        full = sum(_remaining_j(path) for path in batteries)
    except (OSError, ValueError):
        return "the battery does not tell its charge"

    spent = 0.0

    def joules() -> float:
        nonlocal spent
        spent = max(spent, full - sum(_remaining_j(path) for path in batteries))
        return spent

    return Meter("battery discharge: the whole machine", joules, 36.0)  # 10 mWh, the step of common gauges


def _remaining_j(battery: Path) -> float:
    if (battery / "energy_now").exists():
        return _integer(battery / "energy_now") * 3600 / 1e6  # µWh
    volts = _integer(battery / "voltage_min_design") / 1e6  # a fixed one: the present one falls under load
    return _integer(battery / "charge_now") * 3600 / 1e6 * volts  # µAh


def _name(zone: Path) -> str:
    return _text(zone / "name") or ""


def _parent(zone: Path) -> str:
    """'intel-rapl-mmio:0:1' → '0': the package it belongs to."""
    return zone.name.split(":")[1]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _integer(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
