"""Sessions of a bundle for the NPU: each compiled graph wholly on the NPU or its simulator, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgephi.devices.hexagon import SHARE_CONTEXTS, load_options
from edgephi.devices.providers import check_options, register
from edgephi.errors import DeviceError, EngineError
from edgephi.runtime.placement import CPU, Placement, read_placement, twin_options

SPINNING = "session.intra_op.allow_spinning"
QNN = "QNNExecutionProvider"


def open_session(
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
    import onnxruntime

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
    options = twin_options()
    options.add_provider_for_devices([devices[0].raw], settings)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry(SPINNING, "1" if spinning else "0")
    if shared:
        options.add_session_config_entry(SHARE_CONTEXTS, "1")
    return _open(onnxruntime, graph, options, {})


def load_all(graphs: Sequence[str], device: str, htp_arch: int, soc_model: int, shared: bool) -> None:
    """Load every compiled graph and let go of it: for a process that may crash over a damaged binary.

    Raises:
        DeviceError, EngineError: as `open_session`.
    """
    kept = []
    for graph in graphs:
        session = open_session(Path(graph), device, htp_arch, soc_model, shared=shared)
        kept += [session] if shared else []


def open_on_cpu(graph: Path, threads: int, *, spinning: bool = False) -> Any:
    """A session of the embedding, the head or the token graph; its threads rest while the NPU computes, unless
    `spinning`.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """
    import onnxruntime

    options = twin_options()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(SPINNING, "1" if spinning else "0")
    return _open(onnxruntime, graph, options, {"providers": [CPU]})


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


def _open(onnxruntime: Any, graph: Path, options: Any, providers: dict[str, list[str]]) -> Any:
    try:
        session = onnxruntime.InferenceSession(graph, options, enable_fallback=0, **providers)
        session.disable_fallback()
    except Exception as error:
        raise EngineError(
            f"onnxruntime: {' '.join(str(error).split())[:600]}",
            where=graph.name,
            remedy="Check the bundle with `edgephi verify`, or export the model again",
        ) from error
    return session
