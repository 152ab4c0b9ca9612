"""A provider's first steps with a graph, in a child process: what dies there is a sentence here.

The program that loads a bundle never registers a provider with onnxruntime's Python API. The library of a provider
keeps one state for the whole process, and two copies of onnxruntime in it (that package's and onnxruntime-genai's)
would take turns at tearing it down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgephi.child import call
from edgephi.devices.providers import DeviceInfo, graph_traits, provider, register
from edgephi.errors import DeviceError, EngineError, library_errors, one_line
from edgephi.ort import open_session, session_options
from edgephi.runtime.placement.graph_facts import read_graph
from edgephi.runtime.placement.nodes import Placement, from_json, read_placement

if TYPE_CHECKING:
    import onnxruntime

_UPDATE = "Update the provider's wheel and the device's driver, or load the bundle with --device cpu"
TIMEOUT_S = 900.0
"""A software GPU compiles the shaders of a small model for more than a minute."""


@dataclass(frozen=True)
class ProvedDevice:
    """The device a graph was tried on, as onnxruntime lists it."""

    provider: str
    kind: str
    listed_as: str
    """cpu, gpu or npu: what onnxruntime-genai's device filter is told."""
    vendor: str
    vendor_id: int
    device_id: int
    library: str | None
    """The provider's, which onnxruntime loaded; None: it is built into onnxruntime."""


def prove(graph: Path, short: str, options: Mapping[str, str], kinds: Sequence[str]) -> tuple[ProvedDevice, Placement]:
    """Load a graph on a provider's device and compute one token there, in a child process.

    Args:
        graph: of a bundle that was checked.
        short: of the provider.
        options: checked before.
        kinds: of devices that will do; the first the provider lists of them is taken.

    Raises:
        DeviceError: by `step`: the `wheel` is missing, its `library` does not load, there is no `device` of these
            kinds, its `driver` is too old, it refuses `nodes`, or the `process` died.
    """
    arguments = {"graph": str(graph), "short": short, "options": dict(options), "kinds": list(kinds)}
    answer: Any = call("edgephi.runtime.placement.probe:try_graph", arguments, timeout_s=TIMEOUT_S, where=graph)
    return ProvedDevice(**answer["device"]), from_json(answer["placement"])


def try_graph(graph: str, short: str, options: dict[str, str], kinds: list[str]) -> dict[str, Any]:
    """The child's side of `prove`."""
    path = Path(graph)
    device = pick_device(short, register(short), kinds)
    raw = device.raw
    assert raw is not None, "registered in this process"
    require_rows_read(short, path)
    settings = session_options(device=raw, device_options=options, record_placement=True)
    refusal = f"{device.provider} does not load the graph"
    try:
        session = open_session(path, settings, where=path, remedy=_UPDATE, refusal=refusal)
        with library_errors(refusal, where=path, remedy=_UPDATE):
            placed = read_placement(session, path, (device.provider,))
    except EngineError as error:
        raise _refused(error.what, path) from error
    require_placed(placed, path)
    compute_one_token(session, path, device.provider)
    facts = ProvedDevice(
        device.provider,
        device.kind,
        raw.device.type.name.lower(),
        device.vendor,
        device.vendor_id,
        device.device_id,
        device.metadata.get("library_path"),
    )
    return {"device": asdict(facts), "placement": asdict(placed)}


def pick_device(short: str, devices: Sequence[DeviceInfo], kinds: Sequence[str]) -> DeviceInfo:
    """The first device of these kinds.

    Raises:
        DeviceError: there are others only; step `device`.
    """
    for device in devices:
        if device.kind in kinds:
            return device
    listed, known = ", ".join(sorted({device.kind for device in devices})), provider(short)
    raise DeviceError(
        f"{known.name} lists no hardware it runs on, only {listed}",
        remedy="Install the driver of this machine's device; a simulator or software driver is used when a profile is "
        "named" + (f", such as --device {known.profile}" if known.profile else ""),
        step="device",
    )


def require_placed(placed: Placement, graph: Path) -> None:
    """Refuse a division that leaves computing to the CPU.

    Raises:
        DeviceError: naming the operators; step `nodes`.
    """
    name = placed.requested[0]
    if not placed.nodes_per_provider.get(name):
        raise _refused(f"{name} took none of the graph's nodes", graph)
    if placed.refused:
        operators = ", ".join(f"{kept.nodes} {kept.op_type} ({kept.why})" for kept in placed.refused)
        raise _refused(f"{name} left nodes to the CPU: {operators}", graph)


def require_rows_read(short: str, graph: Path) -> None:
    """Refuse a graph that chooses its rope by an input the provider takes and does not read: long sequences would come
    out wrong. edgephi wrote such graphs for WebGPU before it cut the tables.

    Raises:
        DeviceError: step `graph`.
    """
    if not graph_traits(short).row_numbers and read_graph(graph).row_numbers:
        raise DeviceError(
            f"{provider(short).name} does not read the rows of rotary tables that this graph names",
            where=graph.name,
            remedy="Export the model again with this version of edgephi, or load the bundle with --device cpu",
            step="graph",
        )


def compute_one_token(session: onnxruntime.InferenceSession, graph: Path, name: str) -> None:
    """Compute the logits of one token behind an empty cache.

    Raises:
        DeviceError: the provider fails, or its logits are not finite; step `nodes`.
    """
    import numpy as np

    ones = {"input_ids": 1, "attention_mask": 1, "position_ids": 0}
    feeds = {}
    for port in session.get_inputs():
        if port.name in ones:
            feeds[port.name] = np.full((1, 1), ones[port.name], np.int64)
        else:
            kind = np.float16 if "float16" in port.type else np.float32
            feeds[port.name] = np.zeros((1, port.shape[1], 0, port.shape[3]), kind)
    try:
        (logits,) = session.run(["logits"], feeds)
    except Exception as error:
        raise _refused(f"{name} does not run the graph: {one_line(error)}", graph) from error
    if not np.isfinite(logits).all():
        raise _refused(f"{name} computes logits that are not finite", graph)


def _refused(what: str, graph: Path) -> DeviceError:
    return DeviceError(
        what,
        where=graph.name,
        remedy=_UPDATE,
        step="nodes",
    )
