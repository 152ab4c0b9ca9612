"""Which NPU a bundle that was compiled for one runs on: the machine's, or its simulator where a profile is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgephi.bundle import Manifest, NpuFacts
from edgephi.devices.detect import survey
from edgephi.devices.power import spinning
from edgephi.devices.profile import Profile, load_profile, match_profiles
from edgephi.devices.providers import provider
from edgephi.errors import BundleError, DeviceError
from edgephi.runtime.config import refuse_npu_bundle
from edgephi.runtime.dispatch import Choice, beside
from edgephi.runtime.engines.npu_checks import Chip, Device


@dataclass(frozen=True)
class NpuPlace:
    """Where to open it."""

    choice: Choice
    device: Device
    chip: Chip | None
    """As the profile says; None: no profile matches this machine."""


def npu_place(folder: Path, manifest: Manifest, device: str) -> NpuPlace:
    """Choose the NPU or the simulator.

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
    kinds = {one.kind for one in machine.devices if one.provider == provider("qnn").name}
    profile = named or next(
        (match.profile for match in match_profiles(machine) if match.matches and "qnn" in match.profile.prefill), None
    )
    if "npu" in kinds:
        return NpuPlace(_choice(profile, facts), "npu", _chip(profile))
    if named is not None and "npu-simulator" in kinds:
        return NpuPlace(_choice(profile, facts), "npu-simulator", _chip(profile))
    missing = next((one for one in machine.missing if one.provider == "qnn"), None)
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


def _choice(profile: Profile | None, facts: NpuFacts) -> Choice:
    """Tokens on the CPU want its cores, whatever profile matched."""
    on_cpu = facts.tokens_on == "cpu"
    decode = "cpu" if on_cpu else None
    if profile is None:
        decided = spinning("mains", "tokens on the CPU") if on_cpu else beside("qnn")
        return Choice("qnn", None, kinds=("npu",), spinning=decided, decode_provider=decode)
    own = profile.decode[0] == "cpu"
    threads = None if profile.threads == "cores" or (on_cpu and not own) else profile.threads
    decided = spinning(profile.spinning, f"profile {profile.name}")
    if on_cpu and not own:
        decided = spinning("mains", "tokens on the CPU")
    options = profile.providers["qnn"].options
    kinds = ("npu", "npu-simulator")
    return Choice("qnn", None, options, kinds, threads, decided, profile.context_length, profile.name, decode)


def _chip(profile: Profile | None) -> Chip | None:
    options = profile.providers["qnn"].options if profile else {}
    if "htp_arch" not in options or "soc_model" not in options:
        return None
    return Chip(int(options["htp_arch"]), int(options["soc_model"]))
