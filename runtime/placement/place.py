"""Which provider runs a bundle, and where: what `dispatch.py` decides and an engine is opened with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from edgephi.bundle import GraphEntry
from edgephi.devices.cpu import decode_threads
from edgephi.devices.kleidiai import Kleidiai
from edgephi.devices.power import Spinning, spinning
from edgephi.devices.providers.base import HARDWARE
from edgephi.runtime.placement.nodes import Placement
from edgephi.runtime.placement.probe import ProvedDevice


@dataclass(frozen=True)
class ProviderChoice:
    """A provider to try."""

    provider: str
    """Short name."""
    graph: GraphEntry | None
    """None: the NPU's, several, which the manifest lists apart."""
    options: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = HARDWARE
    """Kinds of devices that will do."""
    threads: int | None = None
    """On the CPU; None: one for each fast physical core this process may use."""
    spinning: Spinning = field(default_factory=lambda: spinning("mains", "default"))
    """Whether its idle threads wait actively, and why."""
    kleidiai: Kleidiai | None = None
    """Whether the CPU computes with KleidiAI, and why; None: no Arm processor, or the CPU does not compute."""
    context_length: int | None = None
    profile: str | None = None
    decode_provider: str | None = None
    """Short name of the one that computes the answer's tokens, where it is another."""

    @property
    def may_use_kleidiai(self) -> bool:
        return self.kleidiai is None or self.kleidiai.on


@dataclass(frozen=True)
class Place:
    """Where a bundle runs."""

    choice: ProviderChoice
    device: ProvedDevice | None = None
    """None: the CPU."""
    placement: Placement | None = None
    """None: the CPU provider is the only one there is; `Model.placement` asks it when it is asked."""
    rejected: tuple[str, ...] = ()
    """What was tried before, in order, and why it did not do; empty unless the caller allowed a fallback."""

    @property
    def threads(self) -> int:
        return self.choice.threads or decode_threads()

    def as_json(self) -> dict[str, object]:
        """provider, decode_provider (null: the same), profile (null: none was needed), graph (file, device,
        computes_in), options, threads, spinning (on, because), kleidiai (null, or on, because), device (null, or
        provider, kind, listed_as, vendor, vendor_id, device_id), placement (null, or graph, requested, providers with
        nodes, op_types and weight_bytes, kept with op_type, nodes, weight_bytes, cause and why), rejected."""
        return {
            "provider": self.choice.provider,
            "decode_provider": self.choice.decode_provider,
            "profile": self.choice.profile,
            "graph": self.choice.graph and self.choice.graph.model_dump(),
            "options": dict(self.choice.options),
            "threads": self.threads,
            "spinning": asdict(self.choice.spinning),
            "kleidiai": self.choice.kleidiai and asdict(self.choice.kleidiai),
            "device": self.device and asdict(self.device),
            "placement": self.placement and asdict(self.placement),
            "rejected": list(self.rejected),
        }


@dataclass(frozen=True)
class DispatchPlan:
    """What to try, in order."""

    choices: tuple[ProviderChoice, ...]
    """At least one."""
    rejected: tuple[str, ...] = ()
    """Providers that came first and have no graph in the bundle, as sentences."""


def spinning_off(short: str) -> Spinning:
    """Of the CPU's threads beside an accelerator, given by its short name: to wait actively would cost power that the
    accelerator could use, at the same speed."""
    return Spinning(False, f"{short} computes")


def asked_to_spin(choice: ProviderChoice, asked: bool | None) -> ProviderChoice:
    """A choice with the caller's word on spinning, if there is one."""
    return choice if asked is None else replace(choice, spinning=Spinning(asked, "asked for"))
