"""Which wheels a program needs to run a bundle: the closure of what `runtime.toml` names, as it is installed here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from typing import TYPE_CHECKING

from edgephi.devices.providers import installed_wheel, provider
from edgephi.errors import DeviceError
from edgephi.files import parse_toml

if TYPE_CHECKING:
    from edgephi.devices.providers.base import Provider

OWN = "edgephi"


@dataclass(frozen=True)
class RuntimeNeeds:
    """The content of runtime.toml; names as `normalized` spells them."""

    needs: tuple[str, ...]
    instead: Mapping[str, tuple[str, ...]]
    """Needed distribution → those that bring the same modules."""
    unused: Mapping[str, str]
    """Distribution → why nothing imports it although another requires it."""


@dataclass(frozen=True)
class Wheel:
    """An installed distribution that goes into the package."""

    name: str
    version: str
    requires: tuple[str, ...]
    """Names of those among the package's wheels that it requires."""
    distribution: metadata.Distribution


@cache
def runtime_needs() -> RuntimeNeeds:
    """What runtime.toml says."""
    text = resources.files("edgephi.packaging").joinpath("runtime.toml").read_text(encoding="utf-8")
    data = parse_toml(text)
    needs, instead, unused = data["needs"], data["instead"], data["unused"]
    assert isinstance(needs, list) and isinstance(instead, dict) and isinstance(unused, dict)
    return RuntimeNeeds(tuple(needs), {name: tuple(others) for name, others in instead.items()}, unused)


def runtime_wheels(devices: Collection[str]) -> tuple[Wheel, ...]:
    """The wheels for running a bundle on these devices, edgephi among them, in the order of their names.

    Requirements are those for this Python on this system; extras are left out.

    Args:
        devices: short names of providers.

    Raises:
        DeviceError: a wheel is not installed here, so nothing is known of its version and licence; step `wheel`.
    """
    known = runtime_needs()
    roots = {_installed_name(name, known) for name in known.needs}
    roots |= {_provider_wheel(provider(device)) for device in devices}
    found: dict[str, tuple[metadata.Distribution, set[str]]] = {}
    waiting = sorted(roots)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        wheel = distribution(name)
        required = {
            _installed_name(one, known) for one in _requirements(name, wheel.requires or ()) - known.unused.keys()
        }
        found[name] = (wheel, required)
        waiting += sorted(required)
    found[OWN] = (distribution(OWN), roots)
    return tuple(
        Wheel(name, wheel.version, tuple(sorted(required)), wheel) for name, (wheel, required) in sorted(found.items())
    )


def normalized(name: str) -> str:
    """One spelling for each distribution (packaging.python.org, "Names and normalization")."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(name: str, lines: Iterable[str]) -> set[str]:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        wanted = [Requirement(line) for line in lines]
    except InvalidRequirement as problem:
        raise DeviceError(
            f"what {name} requires cannot be read in its metadata: {str(problem).splitlines()[0]}",
            remedy=f"Install another version of {name}",
            step="wheel",
        ) from problem
    return {normalized(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}


def _installed_name(name: str, known: RuntimeNeeds) -> str:
    """The name itself, or that of the distribution which is installed in its place."""
    return next((one for one in (name, *known.instead.get(name, ())) if _is_installed(one)), name)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _provider_wheel(known: Provider) -> str:
    wheel = installed_wheel(known)
    if wheel is None:
        raise _missing(known.wheels[0])
    return normalized(wheel[0])


def distribution(name: str) -> metadata.Distribution:
    """What is installed under a name, with the metadata of its wheel.

    In a clone that was installed editable lies an .egg-info as well, of building it; where the clone is on Python's
    path, it comes first, and knows neither wheel nor files.

    Raises:
        DeviceError: nothing is, or its metadata is gone, as where pip was ended.
    """
    wheels = [one for one in metadata.distributions(name=name) if one.read_text("METADATA") is not None]
    if not wheels or not wheels[0].version:
        raise _missing(name)
    return wheels[0]


def _missing(name: str) -> DeviceError:
    return DeviceError(
        f"{name} is not installed here, so that its version and its licence are not known",
        remedy=f"Install it with `pip install {name}`, or package the bundle for other devices with --device",
        step="wheel",
    )
