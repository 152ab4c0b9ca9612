"""Bundle × profile × machine → what to try, in which order, and the proof that it runs there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from edgephi.bundle import Manifest
from edgephi.devices.detect import Machine, detect, survey
from edgephi.devices.kleidiai import kleidiai
from edgephi.devices.power import spinning
from edgephi.devices.profile import Profile, load_profile, match_profiles
from edgephi.devices.providers import all_providers, check_options, installed_wheel, provider, providers_of
from edgephi.devices.providers.base import ANY_KIND, HARDWARE
from edgephi.errors import DeviceError, NoGraphError
from edgephi.runtime.placement.config import decode_file
from edgephi.runtime.placement.npu_dispatch import npu_choice
from edgephi.runtime.placement.place import DispatchPlan, Place, ProviderChoice, spinning_off
from edgephi.runtime.placement.probe import prove


def plan(folder: Path, manifest: Manifest, device: str, fallback: bool) -> DispatchPlan:
    """What to try for this bundle: one choice, or with `fallback` those after it as well.

    Args:
        device: `auto`, `cpu`, `gpu`, `npu`, or a profile by its name or by the path of a .toml file. auto takes the
            first provider of the matching profile that the bundle has a graph and the machine a device for; simulators
            and software drivers are taken only when a profile is named. A profile's order for decoding counts, because
            onnxruntime-genai runs a whole sequence in one session.

    Raises:
        DeviceError: there is nothing to try; `step` says what is missing.
        BundleError: only an NPU can run the bundle, and something else was asked for.
    """
    if manifest.npu is not None:
        return DispatchPlan((npu_choice(folder, manifest, device),))
    cpu = _cpu(manifest, None)
    if device == "cpu" or (device == "auto" and {graph.device for graph in manifest.graphs} == {"cpu"}):
        return DispatchPlan((cpu,))
    if device == "auto" or providers_of(device):
        try:
            planned = _matching(folder, manifest, device)
        except DeviceError as error:
            if not fallback:
                raise
            return DispatchPlan((cpu,), (str(error),))
    else:
        planned = _of_profile(folder, manifest, device, detect(), fallback)
    if not fallback:
        return DispatchPlan(planned.choices[:1])
    ends_here = bool(planned.choices) and planned.choices[-1].provider == "cpu"
    return DispatchPlan(planned.choices if ends_here else (*planned.choices, cpu), planned.rejected)


def require_device(device: str) -> None:
    """Find out before any work whether a device's name means something; the machine is not asked.

    Raises:
        DeviceError: it is neither a class of devices nor a profile, or the profile cannot be used.
    """
    if device not in ("auto", "cpu") and not providers_of(device):
        load_profile(device)


def verify_placement(folder: Path, choice: ProviderChoice, rejected: Sequence[str] = ()) -> Place:
    """Prove that a provider runs a choice's graph. On the CPU there is nothing to prove, and the graphs that were
    compiled for an NPU are proved by its engine when it opens them.

    Raises:
        DeviceError: the provider cannot run the graph; `step` says how far it came.
    """
    if choice.provider == "cpu" or choice.graph is None:
        return Place(choice, rejected=tuple(rejected))
    device, placed = prove(folder / decode_file(choice.graph), choice.provider, choice.options, choice.kinds)
    return Place(choice, device, placed, tuple(rejected))


def _matching(folder: Path, manifest: Manifest, device: str) -> DispatchPlan:
    """For `auto` and the classes: by the profile that matches the machine."""
    wanted = [known.short for known in providers_of(device) or all_providers() if known.short != "cpu"]
    there = [short for short in wanted if manifest.graph_for(short) is not None]
    if device != "auto" and not there:
        raise _no_graph(folder, manifest, wanted[0], device)
    machine = survey(short for short in there if sys.platform == "win32" or installed_wheel(provider(short)))
    profile = next((match.profile for match in match_profiles(machine) if match.matches), None)
    order: Sequence[str] = profile.decode if profile else ()
    if device != "auto":
        order = [short for short in order if short in there] or there
    choices = []
    for short in order:
        listed = any(info.provider == provider(short).name and info.is_hardware for info in machine.devices)
        if short == "cpu" or (short in there and (listed or device != "auto")):
            choices.append(_choice(folder, manifest, short, device, profile, machine, HARDWARE))
    return DispatchPlan(tuple(choices) or (_cpu(manifest, profile),))


def _of_profile(folder: Path, manifest: Manifest, device: str, machine: Machine, fallback: bool) -> DispatchPlan:
    """For a profile that was named: its providers, whatever the machine is."""
    profile = load_profile(device)
    choices, rejected = [], []
    for short in profile.decode if fallback else profile.decode[:1]:
        try:
            choices.append(_choice(folder, manifest, short, device, profile, machine, ANY_KIND))
        except DeviceError as error:
            if not fallback:
                raise
            rejected.append(str(error))
    return DispatchPlan(tuple(choices), tuple(rejected))


def _choice(
    folder: Path,
    manifest: Manifest,
    short: str,
    device: str,
    profile: Profile | None,
    machine: Machine,
    kinds: tuple[str, ...],
) -> ProviderChoice:
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
        raise _no_graph(folder, manifest, short, device)
    if profile is None or short not in profile.providers:
        return ProviderChoice(short, graph, kinds=kinds, spinning=spinning_off(short))
    options = profile.provider_options(short, machine)
    check_options(short, options, profile.name)
    threads = None if profile.threads == "cores" else profile.threads
    decided = spinning(profile.spinning, f"profile {profile.name}")
    return ProviderChoice(
        short,
        graph,
        options,
        kinds,
        threads=threads,
        spinning=decided,
        context_length=profile.context_length,
        profile=profile.name,
    )


def _cpu(manifest: Manifest, profile: Profile | None) -> ProviderChoice:
    graph = manifest.graph_for("cpu") or manifest.graphs[0]
    if profile is None:
        return ProviderChoice("cpu", graph, kleidiai=kleidiai(manifest.recipe))
    threads = None if profile.threads == "cores" else profile.threads
    # a profile for an accelerator speaks of threads beside it, not of those that compute
    asked = profile.spinning if profile.decode[0] == "cpu" else "mains"
    who = f"profile {profile.name}"
    return ProviderChoice(
        "cpu",
        graph,
        threads=threads,
        spinning=spinning(asked, who),
        kleidiai=kleidiai(manifest.recipe, profile.kleidiai, who),
        context_length=profile.context_length,
        profile=profile.name,
    )


def _no_graph(folder: Path, manifest: Manifest, short: str, device: str) -> DeviceError:
    """The error where a provider has no graph.

    Args:
        device: as it was asked for.
    """
    known = provider(short)
    if not known.runs_graphs:
        return DeviceError(
            f"edgephi builds no graph for {known.name}",
            where=folder,
            remedy="Choose another --device",
            step="graph",
        )
    asked = known.profile if known.compiled else f"cpu,{short}"
    return NoGraphError(
        f"the bundle has no graph for {known.name}, only for " + ", ".join(graph.device for graph in manifest.graphs),
        where=folder,
        remedy=f"Export {manifest.source.name} again with `edgephi export --device {asked}`",
        device=device,
    )
