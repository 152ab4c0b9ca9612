"""Execution providers that Windows itself keeps up to date: the catalog of Windows ML.

Contract-tested against the Python interface of windowsml 2.5 (`EpCatalog`, `find_all_providers`, `ready_state`,
`ensure_ready`, `library_path`); not run here, there is no such wheel for this system.
"""

from __future__ import annotations

from importlib import import_module, metadata

from edgephi.errors import DeviceError, one_line

WHEEL = "windowsml"


def catalog_library(name: str) -> str | None:
    """Path of a provider's library out of Windows ML's catalog.

    A provider that is on this PC is made ready; one that would have to be downloaded is not fetched unasked.

    Args:
        name: onnxruntime's name of the provider.

    Returns:
        The path; None: the windowsml wheel is not installed, or its catalog does not have the provider.

    Raises:
        DeviceError: step `wheel`: the catalog offers it, but it is not on this PC; step `library`: the catalog fails.
    """
    try:
        version = metadata.version(WHEEL)
    except metadata.PackageNotFoundError:
        return None
    try:
        with import_module(WHEEL).EpCatalog() as catalog:
            for offered in catalog.find_all_providers():
                if offered.name != name:
                    continue
                if offered.ready_state.name == "NotPresent":
                    break
                offered.ensure_ready()
                return str(offered.library_path)
            else:
                return None
    except Exception as error:
        raise DeviceError(
            f"Windows ML's catalog fails: {one_line(error)}",
            where=f"{WHEEL} {version}",
            remedy="Update Windows, or install the provider's own wheel",
            step="library",
        ) from error
    raise DeviceError(
        f"{name} is in Windows ML's catalog, but not on this PC",
        where=f"{WHEEL} {version}",
        remedy="Let Windows Update install it, call its `ensure_ready()`, or install its own wheel",
        step="wheel",
    )
