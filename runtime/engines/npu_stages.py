"""The layers of a bundle for the NPU, loaded: prompts on the NPU, tokens there or on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgephi.bundle import NpuFacts
from edgephi.ort import CPU
from edgephi.runtime.engines.npu_checks import NpuDevice
from edgephi.runtime.engines.npu_session import QNN, open_on_cpu, open_on_npu, placement_of
from edgephi.runtime.placement.nodes import Placement


@dataclass(frozen=True)
class LoadedStage:
    """Consecutive layers."""

    session: Any
    graph: str
    phase: Literal["prefill", "decode"]
    first_layer: int
    last_layer: int
    """The first layer after the stage."""
    placement: Placement


def load_stages(
    folder: Path, facts: NpuFacts, device: NpuDevice, threads: int, *, spinning: bool, kleidiai: bool
) -> tuple[LoadedStage, ...]:
    """Every stage of both phases, in order.

    Args:
        threads, spinning, kleidiai: of the CPU, where tokens are computed there.

    Raises:
        DeviceError, EngineError: as `npu_session.open_on_npu`; or a node is not where it belongs.
    """
    loaded = []
    for stage in facts.stages:
        chip = (facts.htp_arch, facts.soc_model)
        session = open_on_npu(folder / stage.graph, device, *chip, spinning=spinning, shared=facts.shares_weights)
        placed = placement_of(session, folder / stage.graph, QNN)
        loaded.append(LoadedStage(session, stage.graph, stage.phase, stage.first_layer, stage.last_layer, placed))
    if facts.token_graph is not None:
        graph, layers = folder / facts.token_graph, facts.stages[-1].last_layer
        session = open_on_cpu(graph, threads, spinning=spinning, kleidiai=kleidiai)
        loaded.append(LoadedStage(session, facts.token_graph, "decode", 0, layers, placement_of(session, graph, CPU)))
    return tuple(loaded)
