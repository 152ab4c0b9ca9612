"""What a model is prepared for: a device, as people name it, becomes the graphs that an export writes."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from edgephi.devices.detect import Machine, survey
from edgephi.devices.profile import Profile, load_profile, match_profiles
from edgephi.devices.providers import all_providers, installed_wheel, provider, providers_of
from edgephi.store.names import KnownModel

INT4_BYTES_A_PARAMETER = 0.6
"""Less than any int4 bundle takes; phi-4's has 0.61 (docs/results.md#memory-of-large-exports)."""


@dataclass(frozen=True)
class Target:
    """The devices of an export."""

    devices: tuple[str, ...] = ("cpu",)
    """As `edgephi.export_model` takes them."""
    optional: bool = False
    """Whether those other than the CPU are left out where edgephi has no graph of the model for them."""
    unsupported: str | None = None
    """Why this machine cannot run it; None: it can."""

    @property
    def graphs(self) -> frozenset[str]:
        """What a bundle needs to have graphs for."""
        return frozenset({"cpu"} if self.optional else self.devices)


def target_for(device: str) -> Target:
    """What to export for a device.

    Args:
        device: as `edgephi.load` takes it. auto: the CPU, and a GPU that onnxruntime lists. An NPU is for who names it
            (`npu` or a profile): its bundle runs nowhere else.

    Raises:
        DeviceError: no such profile.
    """
    if device == "cpu":
        return Target()
    if device in ("auto", "gpu"):
        shorts = [known.short for known in providers_of("gpu") if known.graph is not None]
        machine = _look(shorts)
        there = tuple(short for short in shorts if _lists(machine, short))
        if device == "auto":
            return Target(("cpu", *there), optional=True)
        if not there:
            return Target(unsupported=f"onnxruntime lists no GPU here{_why(machine)}")
        return Target(("cpu", *there))
    if device == "npu":
        return _npu()
    profile = load_profile(device)
    (match,) = match_profiles(_look([name for name in profile.providers if name != "cpu"]), (profile,))
    if not match.matches:
        return Target(unsupported=f"the profile {profile.name} is not for this machine: {'; '.join(match.reasons)}")
    return _of_profile(profile, device)


def needed_for(device: str) -> Target:
    """What a bundle needs for a device to count as ready: of auto, which takes what there is, the CPU's graph alone.

    Raises:
        DeviceError: as `target_for`.
    """
    return Target() if device == "auto" else target_for(device)


def too_large(known: KnownModel | None) -> str | None:
    """Why a model cannot fit this machine's memory even in int4; None: it may."""
    if known is None or known.parameters is None:
        return None
    import psutil

    needed, there = known.parameters * INT4_BYTES_A_PARAMETER, psutil.virtual_memory().total
    if needed <= there:
        return None
    return f"its weights take at least {needed / 1e9:.1f} GB and this machine has {there / 1e9:.1f} GB of memory"


def _npu() -> Target:
    shorts = [known.short for known in providers_of("npu") if known.compiled]
    machine = _look(shorts)
    for match in match_profiles(machine):
        if match.matches and match.profile.prefill[0] in shorts:
            return _of_profile(match.profile, match.profile.name)
    return Target(unsupported=f"no profile of an NPU that edgephi compiles for matches this machine{_why(machine)}")


def _of_profile(profile: Profile, name: str) -> Target:
    if provider(profile.prefill[0]).compiled:
        return Target((name,))
    graphs = (profile.providers[short].graph for short in profile.decode)
    return Target(tuple(dict.fromkeys(("cpu", *graphs))))


def _look(shorts: list[str]) -> Machine:
    return survey(short for short in shorts if sys.platform == "win32" or installed_wheel(provider(short)))


def _lists(machine: Machine, short: str) -> bool:
    return any(info.provider == provider(short).name and info.is_hardware for info in machine.devices)


def _why(machine: Machine) -> str:
    """What providers said that give no device, and which wheels are not installed."""
    said = [f"{missing.provider}: {missing.reason}" for missing in machine.missing]
    if not said and not any(installed_wheel(known) for known in all_providers() if known.short != "cpu"):
        said = ["no wheel of a GPU or an NPU is installed, see `edgephi devices`"]
    return f" ({'; '.join(said)})" if said else ""
