"""Which NPU a bundle that was compiled for one runs on: the machine's, or its simulator where a profile is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgephi.bundle import Manifest
from edgephi.devices.detect import survey
from edgephi.devices.power import spinning
from edgephi.devices.profile import Profile, load_profile, match_profiles
from edgephi.devices.providers import provider
from edgephi.errors import DeviceError
from edgephi.runtime.config import refuse_npu_bundle
from edgephi.runtime.dispatch import Choice, beside
from edgephi.runtime.npu_checks import Chip, Device


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
        BundleError: something else than an NPU was asked for.
        DeviceError: there is no NPU, and no simulator that was asked for.
    """
    named = None if device in ("auto", "npu", "cpu", "gpu") else load_profile(device)
    if device in ("cpu", "gpu") or (named is not None and named.decode[0] != "qnn"):
        refuse_npu_bundle(folder, manifest)
    machine = survey(("qnn",))
    kinds = {one.kind for one in machine.devices if one.provider == provider("qnn").name}
    profile = named or next(
        (match.profile for match in match_profiles(machine) if match.matches and "qnn" in match.profile.decode), None
    )
    if "npu" in kinds:
        return NpuPlace(_choice(profile), "npu", _chip(profile))
    if named is not None and "npu-simulator" in kinds:
        return NpuPlace(_choice(profile), "npu-simulator", _chip(profile))
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


def _choice(profile: Profile | None) -> Choice:
    if profile is None:
        return Choice("qnn", None, kinds=("npu",), spinning=beside("qnn"))
    threads = None if profile.threads == "cores" else profile.threads
    options = profile.providers["qnn"].options
    decided = spinning(profile.spinning, f"profile {profile.name}")
    kinds = ("npu", "npu-simulator")
    return Choice("qnn", None, options, kinds, threads, decided, profile.context_length, profile.name)


def _chip(profile: Profile | None) -> Chip | None:
    options = profile.providers["qnn"].options if profile else {}
    if "htp_arch" not in options or "soc_model" not in options:
        return None
    return Chip(int(options["htp_arch"]), int(options["soc_model"]))
