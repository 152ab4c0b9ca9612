"""Which NPU a bundle that was compiled for one runs on: the machine's, or its simulator where a profile is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgephi.bundle import Manifest, NpuFacts
from edgephi.devices.detect import survey
from edgephi.devices.kleidiai import kleidiai
from edgephi.devices.power import spinning
from edgephi.devices.profile import Profile, load_profile, match_profiles
from edgephi.devices.providers import provider
from edgephi.errors import BundleError, DeviceError
from edgephi.runtime.placement.config import refuse_npu_bundle
from edgephi.runtime.placement.place import ProviderChoice, spinning_off


def npu_choice(folder: Path, manifest: Manifest, device: str) -> ProviderChoice:
    """Choose the NPU or the simulator: the one kind of device in the choice's `kinds`.

    Args:
        device: as for `edgephi.load`. auto and npu take an NPU; a profile that is named takes the simulator where there
            is no NPU.

    Raises:
        BundleError: something else than an NPU was asked for, or tokens on another device than the bundle has them.
        DeviceError: there is no NPU, and no simulator that was asked for.
    """
    named = None if device in ("auto", "npu", "cpu", "gpu") else load_profile(device)
    facts = manifest.npu
    if facts is None or device in ("cpu", "gpu") or (named is not None and named.prefill[0] != "qnn"):
        refuse_npu_bundle(folder, manifest)
    assert facts is not None
    if named is not None:
        _require_order(folder, facts, named)
    machine = survey(("qnn",))
    kinds = {info.kind for info in machine.devices if info.provider == provider("qnn").name}
    profile = named or next(
        (match.profile for match in match_profiles(machine) if match.matches and "qnn" in match.profile.prefill), None
    )
    choice = _choice(profile, facts)
    if facts.tokens_on == "cpu":
        recipe = manifest.recipe
        decided = kleidiai(recipe) if profile is None else kleidiai(recipe, profile.kleidiai, f"profile {profile.name}")
        choice = replace(choice, kleidiai=decided)
    if "npu" in kinds:
        return replace(choice, kinds=("npu",))
    if named is not None and "npu-simulator" in kinds:
        return replace(choice, kinds=("npu-simulator",))
    missing = next((part for part in machine.missing if part.provider == "qnn"), None)
    if missing is not None:
        raise DeviceError(missing.reason, where=folder, remedy=missing.remedy, step=missing.step)
    raise DeviceError(
        "QNNExecutionProvider lists no NPU on this machine, only its simulator",
        where=folder,
        remedy="Run the bundle on a Snapdragon PC; the simulator is used when a profile is named, such as "
        "--device snapdragon-x-elite",
        step="device",
    )


def _require_order(folder: Path, facts: NpuFacts, profile: Profile) -> None:
    """The first of a profile's `decode` computes the tokens, or nothing does."""
    asked = {"qnn": "npu", "cpu": "cpu"}.get(profile.decode[0])
    if asked != facts.tokens_on:
        where = {"npu": "the NPU", "cpu": "the CPU"}
        raise BundleError(
            f"the bundle has its graph for tokens on {where[facts.tokens_on]}, and {profile.name} wants it on "
            f"{where.get(asked or '', profile.decode[0])}",
            where=folder,
            remedy=f"Name the profile {facts.target}, or export the model again with --device {profile.name}",
        )


def _choice(profile: Profile | None, facts: NpuFacts) -> ProviderChoice:
    """Tokens on the CPU want its cores, whatever profile matched."""
    on_cpu = facts.tokens_on == "cpu"
    decode = "cpu" if on_cpu else None
    if profile is None:
        decided = spinning("mains", "tokens on the CPU") if on_cpu else spinning_off("qnn")
        return ProviderChoice("qnn", None, spinning=decided, decode_provider=decode)
    own = profile.decode[0] == "cpu"
    threads = None if profile.threads == "cores" or (on_cpu and not own) else profile.threads
    decided = spinning(profile.spinning, f"profile {profile.name}")
    if on_cpu and not own:
        decided = spinning("mains", "tokens on the CPU")
    options = profile.providers["qnn"].options
    return ProviderChoice(
        "qnn",
        None,
        options,
        threads=threads,
        spinning=decided,
        context_length=profile.context_length,
        profile=profile.name,
        decode_provider=decode,
    )
