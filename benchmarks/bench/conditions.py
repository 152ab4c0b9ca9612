"""The state of the machine that a number depends on: power source and mode, temperature, throttling."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Thermal:
    """Temperature of the hottest zone, and how often the processor throttled itself since it was switched on."""

    hottest_c: float | None
    throttles: int | None


def power_source(root: Path = Path("/")) -> Literal["mains", "battery"] | None:
    """What feeds the machine; None where it does not say (a desktop without a battery, a virtual machine).

    Args:
        root: where Linux's /sys is found.
    """
    if sys.platform == "linux":
        supplies = sorted((root / "sys/class/power_supply").glob("*"))
        kinds = [(_text(path / "type"), path) for path in supplies if _text(path / "scope") != "Device"]
        online = [_text(path / "online") == "1" for kind, path in kinds if kind in ("Mains", "USB")]
        if any(online):
            return "mains"
        if any(kind == "Battery" and _text(path / "status") == "Discharging" for kind, path in kinds):
            return "battery"
        return None
    import psutil

    battery = psutil.sensors_battery()
    if battery is None or battery.power_plugged is None:
        return None
    return "mains" if battery.power_plugged else "battery"


def power_mode(root: Path = Path("/")) -> str | None:
    """Platform profile, frequency governor and energy preference on Linux; the power mode on Windows."""
    if sys.platform == "win32":
        from edgephi.benchmarks.bench.energy_windows import windows_power_mode

        return windows_power_mode()
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    named = {
        "profile": root / "sys/firmware/acpi/platform_profile",
        "governor": frequency / "scaling_governor",
        "preference": frequency / "energy_performance_preference",
    }
    return ", ".join(f"{name} {text}" for name, path in named.items() if (text := _text(path))) or None


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


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
