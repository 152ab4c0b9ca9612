"""Sessions of a bundle for the NPU: each compiled graph wholly on the NPU or its simulator, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgephi.devices.hexagon import SHARE_CONTEXTS, load_options
from edgephi.devices.providers import check_options, register
from edgephi.errors import DeviceError, EngineError
from edgephi.ort import open_session, session_options
from edgephi.runtime.placement.nodes import Placement, read_placement

QNN = "QNNExecutionProvider"
_VERIFY = "Check the bundle with `edgephi verify`, or export the model again"


def open_on_npu(
    graph: Path, device: str, htp_arch: int, soc_model: int, *, spinning: bool = False, shared: bool = False
) -> Any:
    """A session of a compiled graph, nothing of which falls back to the CPU.

    Args:
        device: "npu", or "npu-simulator": QAIRT's x86 build.
        htp_arch: of the chip, as is soc_model.
        spinning: whether the session's idle CPU threads wait actively.
        shared: graphs share binaries; sessions that are open together load each once.

    Raises:
        DeviceError: the provider is missing, or this machine has no such device.
        EngineError: onnxruntime refuses the graph, or puts a node elsewhere.
    """
    devices = [entry for entry in register("qnn") if entry.kind == device]
    if not devices:
        raise DeviceError(
            f"this machine has no {'NPU' if device == 'npu' else 'NPU simulator'} that {QNN} knows",
            where=device,
            remedy="Run it on a Snapdragon PC with the NPU's driver"
            if device == "npu"
            else "Simulate on an x86-64 machine",
            step="device",
        )
    settings = load_options(htp_arch, soc_model)
    check_options("qnn", settings, graph.name)
    options = session_options(
        device=devices[0].raw,
        device_options=settings,
        cpu_fallback=False,
        spinning=spinning,
        record_placement=True,
        entries={SHARE_CONTEXTS: "1"} if shared else None,
    )
    return open_session(graph, options, where=graph.name, remedy=_VERIFY)


def load_all(graphs: Sequence[str], device: str, htp_arch: int, soc_model: int, shared: bool) -> None:
    """Load every compiled graph and let go of it: for a process that may crash over a damaged binary.

    Raises:
        DeviceError, EngineError: as `open_on_npu`.
    """
    kept = []
    for graph in graphs:
        session = open_on_npu(Path(graph), device, htp_arch, soc_model, shared=shared)
        kept += [session] if shared else []


def open_on_cpu(graph: Path, threads: int, *, spinning: bool = False, kleidiai: bool = True) -> Any:
    """A session of the embedding, the head or the token graph; its threads rest while the NPU computes, unless
    `spinning`.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """
    options = session_options(threads=threads, spinning=spinning, kleidiai=kleidiai, record_placement=True)
    return open_session(graph, options, where=graph.name, remedy=_VERIFY)


def placement_of(session: Any, graph: Path, requested: str) -> Placement:
    """Which provider took which nodes of a session's graph; a compiled graph has one node, its EPContext.

    Raises:
        EngineError: a node is not where it was requested.
    """
    placed = read_placement(session, graph, (requested,))
    if set(placed.nodes_per_provider) != {requested}:
        raise EngineError(
            f"nodes are on {', '.join(sorted(placed.nodes_per_provider)) or 'no provider'} instead of {requested}",
            where=graph.name,
            remedy="Export the model again for this device",
        )
    return placed
