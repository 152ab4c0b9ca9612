"""Execution providers: which wheel brings them, how they are registered, what they find.

A provider other than the CPU's is a library in a wheel of its own. It is registered when it is asked for, not before:
registering QNN makes every `set_provider_selection_policy` of onnxruntime 1.31 fail. edgephi therefore names the device
it wants (`SessionOptions.add_provider_for_devices`) and never leaves the choice to a policy.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgephi.devices.provider_options import DIRECTML, OPENVINO, QNN, WEBGPU, Allowed, check_against, check_htp
from edgephi.devices.vulkan import check_software_vulkan, software_vulkan
from edgephi.devices.windows_ml import catalog_library
from edgephi.errors import DeviceError

if TYPE_CHECKING:
    from onnxruntime import OrtEpDevice

Kind = Literal["cpu", "gpu", "npu", "gpu-software", "npu-simulator"]
"""What a device is. The last two run on the CPU, for tests and compiling; nothing chooses them by itself."""

SOFTWARE_GPU = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
"""Environment variable without which WebGPU refuses a Vulkan driver that computes on the CPU."""


@dataclass(frozen=True)
class Provider:
    """An execution provider of onnxruntime."""

    name: str
    """onnxruntime's own, such as QNNExecutionProvider."""
    short: str
    wheels: tuple[str, ...]
    """The distributions that bring it, any of them; the first is the one to install."""
    module: str | None
    """Imported for its `get_library_path()`; None: built into the onnxruntime of that wheel."""
    extra: str | None
    """The extra of edgephi that installs it; None: it takes the place of the core wheels (`requirements_file`)."""
    options: Mapping[str, Allowed]


@dataclass(frozen=True)
class DeviceInfo:
    """One entry of onnxruntime's device list."""

    provider: str
    kind: Kind
    vendor: str
    vendor_id: int
    """PCI vendor."""
    device_id: int
    metadata: Mapping[str, str]
    """What the hardware and the provider say about themselves; the hardware's word first."""
    raw: OrtEpDevice | None = field(repr=False, compare=False)
    """For `SessionOptions.add_provider_for_devices([raw], options)`; None: seen in another process, see `survey`."""

    @property
    def is_hardware(self) -> bool:
        """False for a simulator or a software driver."""
        return self.kind in ("cpu", "gpu", "npu")

    def as_json(self) -> dict[str, Any]:
        """Plain data: the fields above without onnxruntime's object."""
        names = ("provider", "kind", "vendor", "vendor_id", "device_id")
        return {name: getattr(self, name) for name in names} | {"metadata": dict(self.metadata)}


PROVIDERS: tuple[Provider, ...] = (
    Provider("CPUExecutionProvider", "cpu", ("onnxruntime",), None, None, {}),
    Provider("QNNExecutionProvider", "qnn", ("onnxruntime-qnn",), "onnxruntime_qnn", "qnn", QNN),
    Provider(
        "WebGpuExecutionProvider", "webgpu", ("onnxruntime-ep-webgpu",), "onnxruntime_ep_webgpu", "webgpu", WEBGPU
    ),
    Provider(
        "OpenVINOExecutionProvider",
        "openvino",
        ("onnxruntime-ep-openvino",),
        "onnxruntime_ep_openvino",
        "openvino",
        OPENVINO,
    ),
    Provider("DmlExecutionProvider", "dml", ("onnxruntime-directml", "onnxruntime-windowsml"), None, None, DIRECTML),
)

_registration = threading.Lock()


def provider(name: str) -> Provider:
    """A provider by its short or onnxruntime's name.

    Raises:
        DeviceError: no such provider; step `profile`.
    """
    for known in PROVIDERS:
        if name in (known.short, known.name):
            return known
    raise DeviceError(
        f"no execution provider {name!r}",
        remedy="Name one of " + ", ".join(known.short for known in PROVIDERS),
        step="profile",
    )


def check_options(name: str, options: Mapping[str, str], where: object = None) -> None:
    """Refuse what the provider would swallow: unknown options, impossible values, an NPU whose chip is not named.

    Args:
        name: short or long name of the provider.
        where: the profile the options come from.

    Raises:
        DeviceError: step `options`; names the option and what is known instead.
    """
    known = provider(name)
    check_against(known.name, known.options, options, where)
    if known.short == "qnn":
        check_htp(options, where)


def installed_wheel(known: Provider) -> tuple[str, str] | None:
    """Name and version of the installed wheel that brings a provider, or None. Nothing is loaded."""
    for wheel in known.wheels:
        try:
            return wheel, metadata.version(wheel)
        except metadata.PackageNotFoundError:
            continue
    return None


def requirements_file() -> Path:
    """The wheels with DirectML for a Windows PC of this architecture; they replace the core ones."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    name = "windowsml-windows-arm64.txt" if arm else "directml-windows-x64.txt"
    return Path(__file__).parent / "requirements" / name


def install_command(known: Provider) -> str:
    """The command that installs a provider."""
    if known.extra is not None:
        return f'pip install "edgephi[{known.extra}]"'
    return "pip install edgephi" if known.short == "cpu" else f'pip install -r "{requirements_file()}"'


def registered_devices() -> tuple[DeviceInfo, ...]:
    """What onnxruntime lists now: its built-in providers and those registered in this process."""
    import onnxruntime

    return tuple(describe(device) for device in onnxruntime.get_ep_devices())


def register(name: str) -> tuple[DeviceInfo, ...]:
    """Make a provider's library known to onnxruntime, once per process, and list its devices. Thread-safe.

    Simulators and software drivers are listed too; `DeviceInfo.is_hardware` tells.

    Args:
        name: short or long name of the provider.

    Raises:
        DeviceError: by `step`: the `wheel` is missing, its `library` does not load, there is no `device`, or the
            software `driver` that a machine without a GPU computes with is missing or too old.
    """
    known = provider(name)
    with _registration:
        found = _devices_of(known)
        if not found:
            _register(known)
            found = _devices_of(known)
    if not found:
        raise DeviceError(
            f"{known.name} is installed and loads, but finds no device on this machine",
            where=_origin(known),
            remedy=_device_remedy(known),
            step="device",
        )
    if known.short == "webgpu" and sys.platform == "linux" and not any(device.is_hardware for device in found):
        check_software_vulkan(software_vulkan())
    return found


def _devices_of(known: Provider) -> tuple[DeviceInfo, ...]:
    return tuple(device for device in registered_devices() if device.provider == known.name)


def _register(known: Provider) -> None:
    import onnxruntime

    wheel = installed_wheel(known)
    library = catalog_library(known.name) if wheel is None else None
    if wheel is None and library is None:
        raise DeviceError(
            f"{known.name} is not installed: no wheel {' or '.join(known.wheels)}",
            remedy=(
                "Use webgpu: DirectML is a part of Windows"
                if known.short == "dml" and sys.platform != "win32"
                else f"Install it with `{install_command(known)}`"
            ),
            step="wheel",
        )
    if library is None and known.module is None:
        if known.name not in onnxruntime.get_available_providers():
            raise DeviceError(
                f"{known.wheels[0]} is installed, but the onnxruntime that was imported has no {known.name}",
                where=onnxruntime.__file__,
                remedy="Run `edgephi doctor`: another wheel has overwritten it",
                step="library",
            )
        return
    try:
        if library is None:
            assert known.module is not None
            library = import_module(known.module).get_library_path()
        # under its own name: a QNN device calls itself what its library was registered as
        onnxruntime.register_execution_provider_library(known.name, library)
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        if f"already registered under {known.name}" in reason:
            return
        raise DeviceError(
            f"{known.name} does not load: {reason}",
            where=_origin(known),
            remedy=f"Reinstall it with `{install_command(known)}`, and run `edgephi doctor`",
            step="library",
        ) from error


def _origin(known: Provider) -> str:
    return " ".join(installed_wheel(known) or ("Windows ML's catalog",))


def _device_remedy(known: Provider) -> str:
    if known.short == "webgpu" and os.environ.get(SOFTWARE_GPU) != "1":
        return (
            "Install the GPU's driver; to compute on the CPU through Mesa's software Vulkan, for tests, "
            f"set {SOFTWARE_GPU}=1"
        )
    hardware = {"qnn": "a Qualcomm Snapdragon", "openvino": "an Intel CPU, GPU or NPU", "dml": "a DirectX 12 GPU"}
    return f"Use a machine with {hardware.get(known.short, 'a GPU')} and its driver, or another provider"


def describe(device: OrtEpDevice) -> DeviceInfo:
    """An entry of onnxruntime's device list as plain data."""
    hardware = device.device
    listed = hardware.type.name.lower()
    return DeviceInfo(
        provider=device.ep_name,
        kind=_kind(device.ep_name, listed),
        vendor=hardware.vendor,
        vendor_id=hardware.vendor_id,
        device_id=hardware.device_id,
        metadata={**dict(device.ep_metadata), **dict(hardware.metadata)},
        raw=device,
    )


def _kind(ep_name: str, listed: str) -> Kind:
    """An accelerator's provider on CPU hardware is a simulator (QNN on x86) or a software driver (WebGPU)."""
    if listed == "npu":
        return "npu"
    if listed == "gpu":
        return "gpu"
    if ep_name == "QNNExecutionProvider":
        return "npu-simulator"
    return "gpu-software" if ep_name == "WebGpuExecutionProvider" else "cpu"
