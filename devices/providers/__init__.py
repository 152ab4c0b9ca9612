"""Execution providers: the registry, which wheel brings each, how they are registered, what they find.

A provider is one file of this folder and its name in `PROVIDERS`. One other than the CPU's is a library in a wheel of
its own. It is registered with onnxruntime when it is asked for, not before: registering QNN makes every
`set_provider_selection_policy` of onnxruntime 1.31 fail. edgephi therefore names the device it wants
(`SessionOptions.add_provider_for_devices`) and never leaves the choice to a policy.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from edgephi.devices.providers.base import DeviceInfo as DeviceInfo
from edgephi.devices.providers.base import GraphTraits, Provider
from edgephi.devices.providers.base import Kind as Kind
from edgephi.devices.providers.cpu import CPU
from edgephi.devices.providers.directml import DIRECTML
from edgephi.devices.providers.openvino import OPENVINO
from edgephi.devices.providers.options import check_against
from edgephi.devices.providers.qnn import QNN
from edgephi.devices.providers.webgpu import SOFTWARE_GPU as SOFTWARE_GPU
from edgephi.devices.providers.webgpu import WEBGPU
from edgephi.devices.providers.windows_ml import catalog_library
from edgephi.errors import BundleError, DeviceError, one_line
from edgephi.installed import install_extra

if TYPE_CHECKING:
    from pathlib import Path

    from onnxruntime import OrtEpDevice

    from edgephi.bundle import Manifest

PROVIDERS: tuple[Provider, ...] = (
    CPU,
    QNN,
    WEBGPU,
    OPENVINO,
    DIRECTML,
)
"""Of a class of devices the preferred one first."""

_registration = threading.Lock()


def all_providers() -> tuple[Provider, ...]:
    """Every provider edgephi knows, the CPU's first."""
    return PROVIDERS


def provider(name: str) -> Provider:
    """A provider by its short name, an alias of that, or onnxruntime's name.

    Raises:
        DeviceError: no such provider; step `profile`.
    """
    for known in PROVIDERS:
        if name in (known.short, known.name, *known.aliases):
            return known
    raise DeviceError(
        f"no execution provider {name!r}",
        remedy="Name one of " + ", ".join(known.short for known in PROVIDERS),
        step="profile",
    )


def providers_of(device_class: str) -> tuple[Provider, ...]:
    """The providers of a class of devices (`gpu`, `npu`), the preferred one first; of anything else none."""
    return tuple(known for known in PROVIDERS if known.device_class == device_class)


def graph_devices() -> tuple[str, ...]:
    """Short names of the providers that an export writes a graph for, the CPU's first."""
    return tuple(known.short for known in PROVIDERS if known.graph is not None)


def graph_traits(name: str) -> GraphTraits:
    """What a provider wants of its graph.

    Raises:
        DeviceError: no such provider (step `profile`), or edgephi writes no graph for it (step `graph`).
    """
    known = provider(name)
    if known.graph is None:
        raise DeviceError(f"edgephi builds no graph for {known.name}", remedy="Choose another --device", step="graph")
    return known.graph


def require_known_graphs(folder: Path, manifest: Manifest) -> None:
    """Refuse a manifest with a graph for a device that this version has no provider for.

    `edgephi.bundle` knows nobody, so who uses the graphs of a bundle calls this after reading its manifest.

    Raises:
        BundleError: naming the entry of the manifest.
    """
    from edgephi.bundle import MANIFEST

    known = graph_devices()
    for index, graph in enumerate(manifest.graphs):
        if graph.device not in known:
            raise BundleError(
                f"the manifest cannot be used: graphs.{index}.device: {graph.device!r} is none of {', '.join(known)}",
                where=folder / MANIFEST,
                remedy="Export the model again, or update edgephi if a newer version wrote it",
            )


def check_options(name: str, options: Mapping[str, str], where: object = None) -> None:
    """Refuse what the provider would swallow: unknown options, impossible values, options that contradict each other.

    Args:
        name: short or long name of the provider.
        where: the profile the options come from.

    Raises:
        DeviceError: step `options`; names the option and what is known instead.
    """
    known = provider(name)
    check_against(known.name, known.options, options, where)
    if known.check is not None:
        known.check(options, where)


def installed_wheel(known: Provider) -> tuple[str, str] | None:
    """Name and version of the installed wheel that brings a provider, or None. Nothing is loaded."""
    for wheel in known.wheels:
        try:
            return wheel, metadata.version(wheel)
        except metadata.PackageNotFoundError:
            continue
    return None


def install_command(known: Provider) -> str:
    """The command that installs a provider."""
    if known.extra is None and known.requirements is not None:
        return f'pip install -r "{known.requirements()}"'
    return install_extra(known.extra)


def runtime_wheels() -> tuple[str, ...]:
    """Distributions that bring an onnxruntime of their own, with a provider built in; one at a time is installed."""
    return tuple(wheel for known in PROVIDERS if known.module is None for wheel in known.wheels)


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
    if known.check_devices is not None:
        known.check_devices(found)
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
                known.elsewhere
                if known.only_on is not None and sys.platform != known.only_on
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
        reason = one_line(error)
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
    better = None if known.no_device is None else known.no_device()
    return better or f"Use a machine with {known.hardware} and its driver, or another provider"


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
    return next((known.stand_in for known in PROVIDERS if known.name == ep_name), None) or "cpu"
