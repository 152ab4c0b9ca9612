"""What this machine is: CPU and its instructions, memory, power, and the devices onnxruntime lists."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgephi.child import call
from edgephi.devices.cpu import decode_threads
from edgephi.devices.cpu_features import cpu_features, cpu_name
from edgephi.devices.providers import (
    DeviceInfo,
    all_providers,
    installed_wheel,
    provider,
    register,
    registered_devices,
)
from edgephi.errors import DeviceError, Step


@dataclass(frozen=True)
class Cpu:
    """The processor."""

    name: str
    features: frozenset[str]
    """Instruction sets by Linux's names (avx2, avx512_vnni, asimd …). What the system does not tell is absent."""
    cores: int
    """Physical cores this process may use."""


@dataclass(frozen=True)
class Missing:
    """A provider that gives no device, and how far it came."""

    provider: str
    step: Step
    reason: str
    remedy: str


@dataclass(frozen=True)
class Machine:
    """One machine, as seen from this process."""

    os: str
    """linux, windows or darwin."""
    arch: str
    """x86_64 or arm64."""
    cpu: Cpu
    memory_bytes: int
    available_bytes: int
    power: Literal["mains", "battery", "unknown"]
    devices: tuple[DeviceInfo, ...]
    missing: tuple[Missing, ...] = field(default=())

    def as_json(self) -> dict[str, object]:
        """Plain data: the fields above."""
        return {
            "os": self.os,
            "arch": self.arch,
            "cpu": {"name": self.cpu.name, "features": sorted(self.cpu.features), "cores": self.cpu.cores},
            "memory_bytes": self.memory_bytes,
            "available_bytes": self.available_bytes,
            "power": self.power,
            "devices": [device.as_json() for device in self.devices],
            "missing": [asdict(one) for one in self.missing],
        }


def installed_providers() -> tuple[str, ...]:
    """Short names of the providers whose wheel is installed; nothing is loaded."""
    return tuple(known.short for known in all_providers() if installed_wheel(known) is not None)


def detect(register_these: Iterable[str] = (), root: Path = Path("/")) -> Machine:
    """Look at this machine.

    Args:
        register_these: providers to register in this process first. Those already registered are listed in any case.
            The rest is not looked for: registering loads a library for good and changes the process.
        root: where Linux's /proc and /sys are found.
    """
    import psutil

    missing = []
    for name in (provider(name).short for name in register_these):
        try:
            register(name)
        except DeviceError as error:
            missing.append(Missing(name, error.step, error.what, error.remedy))
    memory = psutil.virtual_memory()
    return Machine(
        os=platform.system().lower(),
        arch=architecture(platform.machine()),
        cpu=Cpu(cpu_name(root), cpu_features(root), decode_threads(root)),
        memory_bytes=memory.total,
        available_bytes=memory.available,
        power=_power(),
        devices=registered_devices(),
        missing=tuple(missing),
    )


def survey(names: Iterable[str], root: Path = Path("/")) -> Machine:
    """Like `detect`, but each provider is registered in a process of its own: this one stays as it is, and a library
    that crashes is a `Missing` with step `process`. Takes about half a second for each provider.
    """
    machine = detect(root=root)
    there = {device.provider for device in machine.devices}
    devices, missing = list(machine.devices), []
    for name in (provider(name).short for name in names):
        if provider(name).name in there:
            continue
        try:
            found = call("edgephi.devices.detect:probe", {"name": name}, timeout_s=120, where=name)
        except DeviceError as error:
            missing.append(Missing(name, error.step, error.what, error.remedy))
        else:
            assert isinstance(found, list)
            devices += [DeviceInfo(**device, raw=None) for device in found]
    return replace(machine, devices=tuple(devices), missing=tuple(missing))


def probe(name: str) -> list[dict[str, Any]]:
    """What `survey` calls in the child."""
    return [device.as_json() for device in register(name)]


def architecture(machine: str) -> str:
    """One name per architecture, whatever the system calls it."""
    name = machine.lower()
    return {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}.get(name, name)


def _power() -> Literal["mains", "battery", "unknown"]:
    import psutil

    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError):  # not on every system
        return "unknown"
    if battery is None:
        return "mains"
    return "unknown" if battery.power_plugged is None else ("mains" if battery.power_plugged else "battery")
