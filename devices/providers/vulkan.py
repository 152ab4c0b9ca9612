"""The software Vulkan driver that WebGPU computes with on a machine without a GPU: Mesa's lavapipe, on Linux.

WebGPU lists such a device whenever it is allowed to, whether the driver is there or not. Mesa before 25 is refused by
WebGPU 0.4 (Debian bookworm's 22.3 was tried), with an error that does not name the driver.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgephi.errors import DeviceError

OLDEST_MESA = 25
_INSTALL = "Install Mesa 25 or newer (Debian bookworm: `apt install -t bookworm-backports mesa-vulkan-drivers`)"


@dataclass(frozen=True)
class SoftwareVulkan:
    """Mesa's lavapipe as far as it is installed."""

    loader: bool
    """libvulkan.so.1 loads."""
    library: Path | None
    """The driver's library, named by its manifest."""
    mesa: str | None
    """Version found in that library; None: not found."""


def software_vulkan(root: Path = Path("/")) -> SoftwareVulkan:
    """Look for lavapipe through the manifests Vulkan's loader reads.

    Source of the places: Khronos' Vulkan-Loader, docs/LoaderDriverInterface.md, "Driver Discovery on Linux".

    Args:
        root: where /etc and /usr are found.
    """
    try:
        ctypes.CDLL("libvulkan.so.1")
        loader = True
    except OSError:
        loader = False
    for manifest in _manifests(root):
        library = _library(manifest, root)
        if library is not None:
            return SoftwareVulkan(loader, library, _mesa_version(library))
    return SoftwareVulkan(loader, None, None)


def check_software_vulkan(found: SoftwareVulkan) -> None:
    """Refuse a software driver that cannot work.

    Raises:
        DeviceError: step `driver`: no loader, no lavapipe, or Mesa too old. An unknown version passes.
    """
    if not found.loader:
        raise DeviceError(
            "the Vulkan loader libvulkan.so.1 is missing",
            remedy="Install it (Debian: `apt install libvulkan1`)",
            step="driver",
        )
    if found.library is None:
        raise DeviceError("there is no software Vulkan driver (lavapipe)", remedy=_INSTALL, step="driver")
    if found.mesa is not None and int(found.mesa.split(".")[0]) < OLDEST_MESA:
        raise DeviceError(
            f"Mesa {found.mesa} is too old for WebGPU", where=found.library, remedy=_INSTALL, step="driver"
        )


def _manifests(root: Path) -> list[Path]:
    named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES")
    if named:
        files = [Path(part) for part in named.split(os.pathsep)]
    else:
        folders = ("etc/vulkan/icd.d", "usr/local/share/vulkan/icd.d", "usr/share/vulkan/icd.d")
        files = [file for folder in folders for file in sorted((root / folder).glob("*.json"))]
    return [file for file in files if "lvp" in file.name]


def _library(manifest: Path, root: Path) -> Path | None:
    try:
        name = json.loads(manifest.read_bytes())["ICD"]["library_path"]
        if name.startswith("/"):
            candidates = [root / name.lstrip("/")]
        elif "/" in name:
            candidates = [manifest.parent / name]
        else:
            folders = [*sorted((root / "usr/lib").glob("*-linux-gnu")), root / "usr/lib64", root / "usr/lib"]
            candidates = [folder / name for folder in folders]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return next((path for path in candidates if path.is_file()), None)


def _mesa_version(library: Path) -> str | None:
    """Mesa's drivers carry their version as text, for `VkPhysicalDeviceDriverProperties.driverInfo`."""
    try:
        found = re.search(rb"Mesa (\d{2}\.\d+\.\d+)", library.read_bytes())
    except OSError:
        return None
    return None if found is None else found[1].decode()
