"""Device profiles: which provider runs what, with which options, on one class of machine. Strict TOML."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from edgephi.devices.kleidiai import KleidiaiUse
from edgephi.devices.providers import all_providers, check_options, provider
from edgephi.devices.providers.base import PowerMode
from edgephi.errors import DeviceError, SourceError
from edgephi.files import parse_toml, read_argument

if TYPE_CHECKING:
    from edgephi.devices.detect import Machine
    from edgephi.devices.providers import DeviceInfo

Text = Annotated[str, Field(min_length=1)]


def _known_provider(name: str) -> str:
    known = {word: one.short for one in all_providers() for word in (one.short, *one.aliases)}
    if name not in known:
        raise _none_of(one.short for one in all_providers())
    return known[name]


def _known_graph(name: str) -> str:
    known = [one.short for one in all_providers() if one.runs_graphs]
    if name not in known:
        raise _none_of(known)
    return name


def _none_of(names: Iterable[str]) -> PydanticCustomError:
    return PydanticCustomError("provider", "Input should be one of {names}", {"names": ", ".join(names)})


ShortName = Annotated[str, AfterValidator(_known_provider)]
GraphName = Annotated[str, AfterValidator(_known_graph)]


class StrictTable(BaseModel):
    """Unknown keys and values of another type are errors: a misspelt setting must not pass for the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DeviceRule(StrictTable):
    """A device that onnxruntime has to list."""

    provider: ShortName
    kind: Literal["cpu", "gpu", "npu"]
    vendor_id: int | None = None
    device_ids: tuple[int, ...] | None = None

    def fits(self, device: DeviceInfo) -> bool:
        return (
            device.provider == provider(self.provider).name
            and device.kind == self.kind
            and (self.vendor_id is None or device.vendor_id == self.vendor_id)
            and (self.device_ids is None or device.device_id in self.device_ids)
        )


class MatchRules(StrictTable):
    """All that are given have to hold."""

    os: tuple[Literal["linux", "windows", "darwin"], ...] | None = None
    arch: Literal["x86_64", "arm64"] | None = None
    cpu_features: tuple[Text, ...] = ()
    cpu_name_contains: tuple[Text, ...] | None = None
    """Any of these, whatever the case: for what the device list does not tell apart."""
    devices: tuple[DeviceRule, ...] | None = None
    """Any of these."""
    memory_gb: float | None = Field(default=None, gt=0)
    """At least so much, in 10^9 bytes."""


class ProviderUse(StrictTable):
    """How one provider is used."""

    graph: GraphName
    """The variant of the bundle's graph it runs."""
    options: dict[str, str] = Field(default_factory=dict)


class PowerModes(StrictTable):
    """Which power mode to ask of a provider."""

    mains: PowerMode = "performance"
    battery: PowerMode = "balanced"


class Profile(StrictTable):
    """One class of machine."""

    name: Text
    summary: Text
    evidence: Literal["run here", "built and simulated", "built, not run here"]
    """How far this profile has been tried."""
    rank: int
    """Among profiles that match, the highest comes first."""
    match: MatchRules
    prefill: tuple[ShortName, ...] = Field(min_length=1)
    """Providers for reading the prompt, the preferred one first."""
    decode: tuple[ShortName, ...] = Field(min_length=1)
    """Providers for writing the answer, the preferred one first."""
    providers: dict[ShortName, ProviderUse]
    threads: Literal["cores"] | Annotated[int, Field(ge=1, le=1024)]
    """CPU threads; `cores`: as many as fast physical cores this process may use."""
    spinning: bool | Literal["mains"]
    """Whether idle CPU threads wait actively: faster on the CPU, a waste beside an NPU. mains: unless the machine runs
    on battery or was told to save power."""
    kleidiai: KleidiaiUse = "exact"
    """On an Arm CPU, which of KleidiAI's kernels are used (`devices/kleidiai.py`)."""
    memory_fraction: float = Field(gt=0, le=1)
    """Ceiling for weights and KV cache, as a share of the machine's memory."""
    context_length: int | None = Field(default=None, ge=1)
    """Tokens; None: the bundle's own."""
    power: PowerModes = PowerModes()

    def memory_ceiling(self, machine: Machine) -> int:
        """Bytes."""
        return int(machine.memory_bytes * self.memory_fraction)

    def provider_options(self, short: str, machine: Machine) -> dict[str, str]:
        """The options of one provider, with what the power mode adds; options written in the profile win."""
        options = dict(self.providers[short].options)
        power = provider(short).power
        if power is not None and power.applies(options):
            mode = self.power.battery if machine.power == "battery" else self.power.mains
            options.setdefault(power.option, power.words[mode])
        return options


@dataclass(frozen=True)
class Match:
    """A profile held against a machine."""

    profile: Profile
    matches: bool
    reasons: tuple[str, ...]
    """For a match every rule that held, otherwise those that did not."""


def load_profile(name: str | Path) -> Profile:
    """A profile of edgephi's own by its name, or a file by its path (anything that ends in .toml).

    Raises:
        DeviceError: no such profile, not TOML, an unknown key, a wrong value, options a provider does not know;
            file and key are named. Step `profile` or `options`.
    """
    path = Path(name)
    if path.suffix == ".toml":
        try:
            text = read_argument(path, "the profile", error=SourceError)
        except SourceError as error:
            raise _wrong(error.what, path) from error
        return parse_profile(text, path)
    own = {file.name.removesuffix(".toml"): file for file in _own_files()}
    if str(name) not in own:
        raise DeviceError(
            f"no profile {str(name)!r}",
            remedy=f"Name a .toml file or one of {', '.join(sorted(own))}",
            step="profile",
        )
    return parse_profile(own[str(name)].read_text(encoding="utf-8"), own[str(name)].name)


def own_profiles() -> tuple[Profile, ...]:
    """The profiles that come with edgephi, the highest rank first."""
    loaded = [parse_profile(file.read_text(encoding="utf-8"), file.name) for file in _own_files()]
    return tuple(sorted(loaded, key=lambda profile: (-profile.rank, profile.name)))


def parse_profile(text: str, where: object) -> Profile:
    """Read a profile's TOML; raises as `load_profile` does."""
    try:
        written: dict[str, Any] = parse_toml(text)
    except ValueError as error:
        raise _wrong(f"the profile is not TOML: {error}", where) from error
    try:
        # pydantic's strict mode takes JSON's arrays for tuples, not Python's lists
        profile = Profile.model_validate_json(json.dumps(written))
    except ValidationError as error:
        findings = [_finding(one["loc"], one["type"], one["msg"]) for one in error.errors()]
        raise _wrong("; ".join(findings), where) from error
    except TypeError as error:  # dates and times of TOML
        raise _wrong(f"the profile holds a value of a kind it has no use for: {error}", where) from error
    if len(profile.providers) < len(written["providers"]):
        raise _wrong(f"[providers] has one provider under two names: {', '.join(written['providers'])}", where)
    for order in (profile.prefill, profile.decode):
        for short in order:
            if short not in profile.providers:
                raise _wrong(f"{short} is named in prefill or decode, but there is no [providers.{short}]", where)
    for short, use in profile.providers.items():
        check_options(short, use.options, where)
    return profile


def match_profiles(machine: Machine, profiles: tuple[Profile, ...] | None = None) -> tuple[Match, ...]:
    """Hold profiles against a machine.

    Simulators and software drivers never make a profile match; name the profile to use one.

    Args:
        profiles: which; None: edgephi's own.

    Returns:
        Those that match first, the highest rank first; then the others with what was missing.
    """
    found = [_hold(profile, machine) for profile in (own_profiles() if profiles is None else profiles)]
    return tuple(sorted(found, key=lambda match: (not match.matches, -match.profile.rank, match.profile.name)))


def _hold(profile: Profile, machine: Machine) -> Match:
    rules = profile.match
    held: list[tuple[bool, str]] = []
    if rules.os is not None:
        held.append((machine.os in rules.os, f"system {machine.os}, wanted {' or '.join(rules.os)}"))
    if rules.arch is not None:
        held.append((machine.arch == rules.arch, f"architecture {machine.arch}, wanted {rules.arch}"))
    for feature in rules.cpu_features:
        there = feature in machine.cpu.features
        held.append((there, f"CPU {'has' if there else 'does not say it has'} {feature}"))
    if rules.cpu_name_contains is not None:
        name = machine.cpu.name.lower()
        there = any(part.lower() in name for part in rules.cpu_name_contains)
        held.append((there, f"CPU {machine.cpu.name!r}, wanted {' or '.join(rules.cpu_name_contains)}"))
    if rules.memory_gb is not None:
        there = machine.memory_bytes >= rules.memory_gb * 1e9
        held.append((there, f"memory {machine.memory_bytes / 1e9:.1f} GB, wanted {rules.memory_gb:g}"))
    if rules.devices is not None:
        there = any(rule.fits(device) for rule in rules.devices for device in machine.devices)
        held.append((there, _devices_said(rules.devices, machine)))
    matches = all(holds for holds, _ in held)
    return Match(profile, matches, tuple(said for holds, said in held if holds == matches))


def _devices_said(rules: tuple[DeviceRule, ...], machine: Machine) -> str:
    for rule in rules:
        for device in machine.devices:
            if rule.fits(device):
                return f"{device.provider} lists {device.kind} {device.vendor} {device.device_id:#06x}"
    said = []
    for short in dict.fromkeys(rule.provider for rule in rules):
        missing = next((one for one in machine.missing if one.provider == short), None)
        kinds = " or ".join(dict.fromkeys(rule.kind for rule in rules if rule.provider == short))
        said.append(f"no such {kinds} of {short}" + (f": {missing.reason}" if missing else ""))
    return "; ".join(said)


def _own_files() -> list[resources.abc.Traversable]:
    folder = resources.files("edgephi.devices").joinpath("profiles")
    return [file for file in folder.iterdir() if file.name.endswith(".toml")]


def _finding(place: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(part) for part in place)
    return f"unknown key {key}" if kind == "extra_forbidden" else f"{key}: {message[:1].lower()}{message[1:]}"


def _wrong(what: str, where: object) -> DeviceError:
    return DeviceError(
        what, where=where, remedy="Correct it; a profile that comes with edgephi shows every key", step="profile"
    )
