"""Which device a benchmark runs on."""

from __future__ import annotations

from pathlib import Path

from edgephi.errors import UsageError
from edgephi.runtime.model import Model, load

DEVICES = ("cpu",)


def check_device(device: str) -> None:
    """Raises UsageError for a device that cannot be benchmarked."""
    if device not in DEVICES:
        raise UsageError(f"there is no device {device!r} to measure on", remedy=f"Name one of {', '.join(DEVICES)}")


def load_on(folder: Path, device: str) -> Model:
    """Load a bundle on a device.

    Raises:
        UsageError: no such device.
        EdgephiError: see `edgephi.load`.
    """
    check_device(device)
    return load(folder)
