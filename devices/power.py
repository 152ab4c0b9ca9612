"""What feeds this machine and how it was told to use it, and whether idle threads may wait actively there."""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

POWER_MODES = {
    "961cc777-2547-4f9d-8174-7d86181b8a7a": "best power efficiency",
    "00000000-0000-0000-0000-000000000000": "balanced",
    "3af9b8d9-7c97-431d-ad78-34a8bfea439f": "better performance",
    "ded574b5-45a0-4f42-8737-46345c09c238": "best performance",
}
"""Windows: the power mode slider's overlays."""
POWER_STATUS = struct.Struct("<4BII")
"""SYSTEM_POWER_STATUS (winbase.h): ACLineStatus, BatteryFlag, BatteryLifePercent, SystemStatusFlag, two times."""
SCALING_ITSELF = ("intel_pstate", "amd-pstate-epp")
"""Drivers whose governor `powersave` is the ordinary one (Documentation/admin-guide/pm/intel_pstate.rst,
amd-pstate.rst)."""


@dataclass(frozen=True)
class PowerState:
    """The state of one moment."""

    source: Literal["mains", "battery"] | None
    """None where the system does not say (a desktop without a battery, a virtual machine)."""
    mode: str | None
    """As the system calls it."""
    saving: bool
    """Whether the system was told to save power."""


@dataclass(frozen=True)
class Spinning:
    """Whether a CPU thread without work waits actively: the next operator starts sooner, and the core never rests."""

    on: bool
    because: str


def read_power(root: Path = Path("/")) -> PowerState:
    """Look now; costs less than a millisecond.

    Args:
        root: where Linux's /sys is found.
    """
    return PowerState(power_source(root), power_mode(root), _saving(root))


def spinning(asked: bool | Literal["mains"], who: str, root: Path = Path("/")) -> Spinning:
    """Decide.

    Args:
        asked: True and False are final; "mains" means: unless on battery or told to save power.
        who: asked, for the record.
    """
    if asked != "mains":
        return Spinning(asked, who)
    power = read_power(root)
    if power.source == "battery":
        return Spinning(False, "on battery")
    if power.saving:
        return Spinning(False, f"saving power: {power.mode}")
    return Spinning(True, "on mains" if power.source else "no battery is known")


def power_source(root: Path = Path("/")) -> Literal["mains", "battery"] | None:
    """What feeds the machine; None where it does not say."""
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
        mode = _windows_overlay()
        return ", ".join(part for part in (mode, "battery saver" if _windows_saver() else None) if part) or None
    return ", ".join(f"{name} {text}" for name, text in _linux_modes(root).items()) or None


def is_battery_saver(status: bytes) -> bool:
    """Of a SYSTEM_POWER_STATUS."""
    return bool(POWER_STATUS.unpack(status)[3] == 1)


def _saving(root: Path) -> bool:
    if sys.platform == "win32":
        return _windows_saver() or _windows_overlay() == "best power efficiency"
    modes = _linux_modes(root)
    driver = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver")
    return (
        modes.get("profile") == "low-power"
        or modes.get("preference") == "power"
        or (modes.get("governor") == "powersave" and driver not in SCALING_ITSELF)
    )


def _linux_modes(root: Path) -> dict[str, str]:
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    named = {
        "profile": root / "sys/firmware/acpi/platform_profile",
        "governor": frequency / "scaling_governor",
        "preference": frequency / "energy_performance_preference",
    }
    return {name: text for name, path in named.items() if (text := _text(path))}


def _windows_overlay() -> str | None:
    """The position of the power mode slider. Built, not run here."""
    if sys.platform != "win32":
        return None
    import ctypes
    import uuid

    buffer = ctypes.create_string_buffer(16)
    if ctypes.windll.powrprof.PowerGetEffectiveOverlayScheme(buffer):
        return None
    identity = str(uuid.UUID(bytes_le=buffer.raw))
    return POWER_MODES.get(identity, identity)


def _windows_saver() -> bool:
    """Built, not run here."""
    if sys.platform != "win32":
        return False
    import ctypes

    buffer = ctypes.create_string_buffer(POWER_STATUS.size)
    return bool(ctypes.windll.kernel32.GetSystemPowerStatus(buffer)) and is_battery_saver(buffer.raw)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
