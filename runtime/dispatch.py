"""Bundle × profile × machine → what to try, in which order, and the proof that it runs there."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from edgephi.bundle import GraphEntry, Manifest
from edgephi.devices.cpu import decode_threads
from edgephi.devices.detect import Machine, detect, survey
from edgephi.devices.power import Spinning, spinning
from edgephi.devices.profile import Profile, load_profile, match_profiles
from edgephi.devices.providers import all_providers, check_options, installed_wheel, provider, providers_of
from edgephi.devices.providers.base import ANY_KIND, HARDWARE
from edgephi.errors import DeviceError
from edgephi.runtime.config import answering, refuse_npu_bundle
from edgephi.runtime.placement import Placement
from edgephi.runtime.probe import ProvedDevice, prove


@dataclass(frozen=True)
class Choice:
    """A provider to try."""

    provider: str
    """Short name."""
    graph: GraphEntry | None
    """None: the NPU's, several, which the manifest lists apart."""
    options: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = HARDWARE
    """Kinds of devices that will do."""
    threads: int | None = None
    """On the CPU; None: one for each physical core this process may use."""
    spinning: Spinning = field(default_factory=lambda: spinning("mains", "default"))
    """Whether its idle threads wait actively, and why."""
    context_length: int | None = None
    profile: str | None = None
    decode_provider: str | None = None
    """Short name of the one that computes the answer's tokens, where it is another."""


@dataclass(frozen=True)
class Place:
    """Where a bundle runs."""

    choice: Choice
    device: ProvedDevice | None = None
    """None: the CPU."""
    placement: Placement | None = None
    """None: the CPU provider is the only one there is; `Model.placement` asks it when it is asked."""
    passed_over: tuple[str, ...] = ()
    """What was tried before, in order, and why it did not do; empty unless the caller allowed a fallback."""

    @property
    def threads(self) -> int:
        return self.choice.threads or decode_threads()

    def as_json(self) -> dict[str, object]:
        """provider, decode_provider (null: the same), profile (null: none was needed), graph (file, device,
        computes_in), options, threads, spinning (on, because), device (null, or provider, kind, listed_as, vendor,
        vendor_id, device_id), placement (null, or graph, requested, providers with nodes, op_types and weight_bytes,
        kept with op_type, nodes, weight_bytes, cause and why), passed_over."""
        return {
            "provider": self.choice.provider,
            "decode_provider": self.choice.decode_provider,
            "profile": self.choice.profile,
            "graph": self.choice.graph and self.choice.graph.model_dump(),
            "options": dict(self.choice.options),
            "threads": self.threads,
            "spinning": asdict(self.choice.spinning),
            "device": self.device and asdict(self.device),
            "placement": self.placement and asdict(self.placement),
            "passed_over": list(self.passed_over),
        }


@dataclass(frozen=True)
class Plan:
    """What to try, in order."""

    choices: tuple[Choice, ...]
    """At least one."""
    passed_over: tuple[str, ...] = ()
    """Providers that came first and have no graph in the bundle, as sentences."""


def plan(folder: Path, manifest: Manifest, device: str, fallback: bool) -> Plan:
    """What to try for this bundle: one choice, or with `fallback` those after it as well.

    Args:
        device: `auto`, `cpu`, `gpu`, `npu`, or a profile by its name or by the path of a .toml file. auto takes the
            first provider of the matching profile that the bundle has a graph and the machine a device for; simulators
            and software drivers are taken only when a profile is named. A profile's order for decoding counts, because
            onnxruntime-genai runs a whole sequence in one session.

    Raises:
        DeviceError: there is nothing to try; `step` says what is missing.
        BundleError: only an NPU can run the bundle.
    """
    refuse_npu_bundle(folder, manifest)
    cpu = _cpu(manifest, None)
    if device == "cpu" or (device == "auto" and {graph.device for graph in manifest.graphs} == {"cpu"}):
        return Plan((cpu,))
    if device == "auto" or providers_of(device):
        try:
            found = _matching(folder, manifest, device)
        except DeviceError as error:
            if not fallback:
                raise
            return Plan((cpu,), (str(error),))
    else:
        found = _of_profile(folder, manifest, load_profile(device), detect(), fallback)
    if not fallback:
        return Plan(found.choices[:1])
    ends_here = bool(found.choices) and found.choices[-1].provider == "cpu"
    return Plan(found.choices if ends_here else (*found.choices, cpu), found.passed_over)


def beside(short: str) -> Spinning:
    """Beside an accelerator nobody waits actively: it costs power the accelerator could use, at the same speed."""
    return Spinning(False, f"{short} computes")


def asked_to_spin(choice: Choice, asked: bool | None) -> Choice:
    """A choice with the caller's word on spinning, if there is one."""
    return choice if asked is None else replace(choice, spinning=Spinning(asked, "asked for"))


def settle(folder: Path, choice: Choice, passed_over: Sequence[str] = ()) -> Place:
    """Prove a choice.

    Raises:
        DeviceError: the provider cannot run the graph; `step` says how far it came.
    """
    if choice.provider == "cpu":
        return Place(choice, passed_over=tuple(passed_over))
    assert choice.graph is not None
    device, placed = prove(folder / answering(choice.graph), choice.provider, choice.options, choice.kinds)
    return Place(choice, device, placed, tuple(passed_over))


def _matching(folder: Path, manifest: Manifest, device: str) -> Plan:
    """For `auto` and the classes: by the profile that matches the machine."""
    wanted = [known.short for known in providers_of(device) or all_providers() if known.short != "cpu"]
    there = [short for short in wanted if manifest.graph_for(short) is not None]
    if device != "auto" and not there:
        raise _no_graph(folder, manifest, wanted[0])
    machine = survey(short for short in there if sys.platform == "win32" or installed_wheel(provider(short)))
    profile = next((match.profile for match in match_profiles(machine) if match.matches), None)
    order: Sequence[str] = profile.decode if profile else ()
    if device != "auto":
        order = [short for short in order if short in there] or there
    found = []
    for short in order:
        listed = any(one.provider == provider(short).name and one.is_hardware for one in machine.devices)
        if short == "cpu" or (short in there and (listed or device != "auto")):
            found.append(_choice(folder, manifest, short, profile, machine, HARDWARE))
    return Plan(tuple(found) or (_cpu(manifest, profile),))


def _of_profile(folder: Path, manifest: Manifest, profile: Profile, machine: Machine, fallback: bool) -> Plan:
    """For a profile that was named: its providers, whatever the machine is."""
    found, passed_over = [], []
    for short in profile.decode if fallback else profile.decode[:1]:
        try:
            found.append(_choice(folder, manifest, short, profile, machine, ANY_KIND))
        except DeviceError as error:
            if not fallback:
                raise
            passed_over.append(str(error))
    return Plan(tuple(found), tuple(passed_over))


def _choice(
    folder: Path, manifest: Manifest, short: str, profile: Profile | None, machine: Machine, kinds: tuple[str, ...]
) -> Choice:
    if profile is not None and manifest.stored_bytes > profile.memory_ceiling(machine):
        raise DeviceError(
            f"the bundle takes {manifest.stored_bytes / 1e9:.1f} GB and the profile allows "
            f"{profile.memory_ceiling(machine) / 1e9:.1f} GB on this machine",
            where=profile.name,
            remedy="Export the model with fewer bits, or name a profile with a larger memory_fraction",
            step="profile",
        )
    if short == "cpu":
        return _cpu(manifest, profile)
    graph = manifest.graph_for(short)
    if graph is None:
        raise _no_graph(folder, manifest, short)
    if profile is None or short not in profile.providers:
        return Choice(short, graph, kinds=kinds, spinning=beside(short))
    options = profile.provider_options(short, machine)
    check_options(short, options, profile.name)
    threads = None if profile.threads == "cores" else profile.threads
    decided = spinning(profile.spinning, f"profile {profile.name}")
    return Choice(short, graph, options, kinds, threads, decided, profile.context_length, profile.name)


def _cpu(manifest: Manifest, profile: Profile | None) -> Choice:
    graph = manifest.graph_for("cpu") or manifest.graphs[0]
    if profile is None:
        return Choice("cpu", graph)
    threads = None if profile.threads == "cores" else profile.threads
    # a profile for an accelerator speaks of threads beside it, not of those that compute
    asked = profile.spinning if profile.decode[0] == "cpu" else "mains"
    decided = spinning(asked, f"profile {profile.name}")
    return Choice("cpu", graph, {}, HARDWARE, threads, decided, profile.context_length, profile.name)


def _no_graph(folder: Path, manifest: Manifest, short: str) -> DeviceError:
    known = provider(short)
    if not known.runs_graphs:
        return DeviceError(
            f"edgephi builds no graph for {known.name}",
            where=folder,
            remedy="Choose another --device",
            step="graph",
        )
    asked = known.profile if known.compiled else f"cpu,{short}"
    return DeviceError(
        f"the bundle has no graph for {known.name}, only for " + ", ".join(graph.device for graph in manifest.graphs),
        where=folder,
        remedy=f"Export {manifest.source.name} again with `edgephi export --device {asked}`",
        step="graph",
    )
