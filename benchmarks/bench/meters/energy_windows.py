"""Windows: the Energy Meter Interface and the battery. Built, not run here.

Structures and control codes: emi.h and winnt.h (learn.microsoft.com/windows/win32/api/emi). What Windows answers is
parsed by functions of bytes, which tests feed.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgephi.benchmarks.bench.meters.energy import Meter, Unwrapped

GUID_DEVICE_ENERGY_METER = struct.pack("<IHH8B", 0x45BD8344, 0x7ED6, 0x49CF, *bytes.fromhex("a440c276c933b053"))
GET_VERSION, GET_METADATA_SIZE, GET_METADATA, GET_MEASUREMENT = 0x224000, 0x224004, 0x224008, 0x22400C
JOULES_PER_PICOWATT_HOUR = 3.6e-9
NAME_BYTES = 32
"""HardwareOEM and HardwareModel: 16 UTF-16 units each."""

BATTERY_STATE = struct.Struct("<4B4xIIiI8x")
"""SYSTEM_BATTERY_STATE: AcOnLine, BatteryPresent, Charging, Discharging; MaxCapacity, RemainingCapacity (mWh), Rate,
EstimatedTime."""

Control = Callable[[int, int], bytes]
"""(control code, most bytes wanted) → what the device answered."""


@dataclass(frozen=True)
class EmiDevice:
    """A metering device and the names of its channels."""

    control: Control
    channels: tuple[str, ...]

    def picowatt_hours(self) -> list[int]:
        """The counter of every channel."""
        data = self.control(GET_MEASUREMENT, 16 * len(self.channels))
        return [energy for energy, _ in struct.iter_unpack("<QQ", data)]


def emi_device(control: Control) -> EmiDevice:
    """Ask a device what it measures.

    Raises:
        ValueError: an answer that is not of the documented form.
    """
    try:
        (version,) = struct.unpack_from("<H", control(GET_VERSION, 2))
        (size,) = struct.unpack_from("<I", control(GET_METADATA_SIZE, 4))
        return EmiDevice(control, channel_names(control(GET_METADATA, size), version))
    except struct.error as error:
        raise ValueError(f"the energy meter's answer is too short: {error}") from error


def channel_names(metadata: bytes, version: int) -> tuple[str, ...]:
    """Names in EMI_METADATA_V1 or EMI_METADATA_V2."""
    if version == 1:
        (size,) = struct.unpack_from("<H", metadata, 4 + 2 * NAME_BYTES + 2)
        return (_text(metadata, 4 + 2 * NAME_BYTES + 4, size),)
    if version != 2:
        raise ValueError(f"version {version} of the Energy Meter Interface is not known")
    (count,) = struct.unpack_from("<H", metadata, 2 * NAME_BYTES + 2)
    names, offset = [], 2 * NAME_BYTES + 4
    for _ in range(count):
        _, size = struct.unpack_from("<IH", metadata, offset)
        names.append(_text(metadata, offset + 6, size))
        offset += 6 + size
    return tuple(names)


def choose_channels(names: Sequence[str]) -> list[int]:
    """Indices of the channels to add up: packages (and their memory), else the whole system; [] when neither is there.

    Whole words decide: a package contains its cores' and graphics' rails, which must not be counted twice.
    """
    words = [set(re.split(r"[^A-Z0-9]+", name.upper())) for name in names]
    package = [index for index, found in enumerate(words) if found & {"PKG", "PACKAGE", "SOCKET"}]
    if package:
        return package + [index for index, found in enumerate(words) if "DRAM" in found]
    return [index for index, found in enumerate(words) if found & {"SYS", "PSYS", "SYSTEM"}][:1]


def find_windows_meter() -> Meter | str:
    """The Energy Meter Interface, else the battery while it discharges, else why neither."""
    emi = find_emi([_controller(path) for path in _device_paths()])
    if isinstance(emi, Meter):
        return emi
    battery = battery_meter(_battery_state)
    return battery if isinstance(battery, Meter) else f"{emi}; {battery}"


def find_emi(controls: Sequence[Control]) -> Meter | str:
    """The first device that has channels to add up."""
    if not controls:
        return "there is no Energy Meter Interface"
    seen: list[str] = []
    for control in controls:
        try:
            device = emi_device(control)
        except (OSError, ValueError) as error:
            seen.append(str(error))
            continue
        chosen = choose_channels(device.channels)
        seen += device.channels
        if chosen:
            return _meter(device, chosen)
    return f"the Energy Meter Interface has no channel of the package or the system ({', '.join(seen)})"


def _meter(device: EmiDevice, chosen: list[int]) -> Meter:
    def read() -> list[int]:
        counters = device.picowatt_hours()
        return [counters[index] for index in chosen]

    counter = Unwrapped(read, [2**64] * len(chosen))
    names = ", ".join(device.channels[index] for index in chosen)
    return Meter(f"Energy Meter Interface: {names}", lambda: counter() * JOULES_PER_PICOWATT_HOUR, 0.01)


def battery_meter(state: Callable[[], bytes]) -> Meter | str:
    """What the battery lost; `state` gives a SYSTEM_BATTERY_STATE."""
    _, present, _, discharging, _, start, _, _ = BATTERY_STATE.unpack(state())
    if not present:
        return "there is no battery"
    if not discharging:
        return "the battery is not discharging"

    def joules() -> float:
        return max(0.0, float(start - BATTERY_STATE.unpack(state())[5]) * 3.6)

    return Meter("battery discharge: the whole machine", joules, 36.0)


def _text(data: bytes, offset: int, size: int) -> str:
    if offset + size > len(data):
        raise ValueError("the energy meter's answer is too short for the name in it")
    return data[offset : offset + size].decode("utf-16-le", errors="replace").rstrip("\0")


def _battery_state() -> bytes:
    if sys.platform != "win32":
        raise OSError("asked of Windows only")
    import ctypes

    buffer = ctypes.create_string_buffer(BATTERY_STATE.size)
    system_battery_state = 5
    if ctypes.windll.powrprof.CallNtPowerInformation(system_battery_state, None, 0, buffer, len(buffer)):
        return bytes(BATTERY_STATE.size)
    return buffer.raw


def _device_paths() -> list[str]:
    """Device interfaces of the class, by the configuration manager."""
    if sys.platform != "win32":
        raise OSError("asked of Windows only")
    import ctypes

    manager = ctypes.windll.cfgmgr32
    length = ctypes.c_ulong()
    if manager.CM_Get_Device_Interface_List_SizeW(ctypes.byref(length), GUID_DEVICE_ENERGY_METER, None, 0):
        return []
    buffer = ctypes.create_unicode_buffer(max(1, length.value))
    if manager.CM_Get_Device_Interface_ListW(GUID_DEVICE_ENERGY_METER, None, buffer, length, 0):
        return []
    return [path for path in "".join(buffer).split("\0") if path]


def _controller(path: str) -> Control:
    """DeviceIoControl on a device interface; the handle lives as long as the process."""
    if sys.platform != "win32":
        raise OSError("asked of Windows only")
    import ctypes

    kernel = ctypes.windll.kernel32
    kernel.CreateFileW.restype = ctypes.c_void_p
    generic_read, share_read_write, open_existing = 0x80000000, 3, 3
    handle = ctypes.c_void_p(kernel.CreateFileW(path, generic_read, share_read_write, None, open_existing, 0, None))

    def control(code: int, size: int) -> bytes:
        buffer, returned = ctypes.create_string_buffer(max(1, size)), ctypes.c_ulong()
        if not kernel.DeviceIoControl(handle, code, None, 0, buffer, size, ctypes.byref(returned), None):
            raise OSError(f"the energy meter refused control code {code:#x}")
        return buffer.raw[: returned.value]

    return control
