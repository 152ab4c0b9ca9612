"""Graphs of fixed shape become context binaries, in a child process, and nothing the child says is believed unread.

onnxruntime writes the uncompiled graph when nothing was compiled, splits a graph at a node the NPU does not take, and
crashes with the compiler. Each of these is an error here that names the node, or else the graph.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgephi.devices.child import call
from edgephi.devices.hexagon import (
    COMPATIBILITY_KEY,
    CompiledFor,
    HexagonTarget,
    compile_options,
    parse_compatibility,
)
from edgephi.devices.providers import install_command, installed_wheel, provider
from edgephi.errors import DeviceError

TRACE = "qnn_op_trace.json"
"""The provider's own name for the list of operators it takes, and why not."""
COMPILING_S = 3600.0
_REPORT_IT = "Export for another device, or report the model and this message to edgephi"
AFFINITY = {"op_type": {"GroupQueryAttention": "HTP"}}


@dataclass(frozen=True)
class Compiled:
    """A compiled stage."""

    graph: Path
    """A graph of one node that runs the binary."""
    binary: Path
    nodes: int
    """Nodes of the graph that was compiled; all of them are in the binary."""
    built_for: CompiledFor
    seconds: float
    peak_bytes: int
    """Most memory the compiling process held."""


def compile_stage(graph: Path, output: Path, target: HexagonTarget, work: Path) -> Compiled:
    """Compile a graph for a target.

    Args:
        graph: an ONNX file, every dimension a number.
        output: the ONNX file to make; the binary lies beside it.
        work: an empty folder for what the child leaves.

    Raises:
        DeviceError: by `step`: the `wheel` is missing, an output exists or the compiler refuses the graph or some
            `nodes`, or its `process` crashed.
    """
    require_compiler()
    for path in (output, output.with_name(f"{output.stem}_qnn.bin")):
        if path.exists():
            raise _refused("the file to compile to exists", path, "Choose another --output")
    affinity = work / "op_affinity.json"
    affinity.write_text(json.dumps(AFFINITY), encoding="utf-8")
    report = _compile_in_child(graph, output, compile_options(target, affinity.absolute(), work.absolute()))
    trace = _read_trace(work / TRACE)
    if trace is not None:
        _require_all_nodes(trace, graph)
    if report["refusal"] is not None or trace is None:
        said = report["refusal"] or "it does not say which operators it took"
        raise _refused(f"the NPU's compiler refused the graph: {said}", graph.name)
    binary, built_for = _read_compiled(output)
    if (built_for.htp_arch, built_for.soc_model) != (target.htp_arch, target.soc_model):
        raise _refused(
            f"the compiler built for v{built_for.htp_arch}, chip {built_for.soc_model}, and was asked for "
            f"v{target.htp_arch}, chip {target.soc_model}",
            graph.name,
            "Install the version of onnxruntime-qnn that edgephi names",
        )
    nodes = int(trace["summary"]["supported_nodes"])
    return Compiled(output, binary, nodes, built_for, float(report["seconds"]), int(report["peak_bytes"]))


def _compile_in_child(graph: Path, output: Path, options: dict[str, str]) -> dict[str, Any]:
    arguments = {"graph": str(graph.absolute()), "output": str(output.absolute()), "options": options}
    try:
        report = call(
            "edgephi.export.npu.compile_child:compile_graph", arguments, timeout_s=COMPILING_S, where=graph.name
        )
    except DeviceError as error:
        if error.step != "process":
            raise
        raise DeviceError(
            f"the NPU's compiler did not finish: {error.what}",
            where=graph.name,
            remedy="Free memory and export again: a system short of it kills its largest process. If it happens again, "
            "report the model and this message to edgephi",
            step="process",
        ) from error
    assert isinstance(report, dict)
    return report


def require_compiler() -> None:
    """Raises DeviceError when the wheel with Qualcomm's compiler is not installed."""
    qnn = provider("qnn")
    if installed_wheel(qnn) is None:
        raise DeviceError(
            f"graphs for the NPU are compiled by {qnn.wheels[0]}, which is not installed",
            remedy=f"Install it with `{install_command(qnn)}`",
            step="wheel",
        )


def _refused(what: str, where: object, remedy: str = _REPORT_IT) -> DeviceError:
    return DeviceError(what, where=where, remedy=remedy, step="nodes")


def _read_trace(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trace


def _require_all_nodes(trace: dict[str, Any], graph: Path) -> None:
    """The compiler's own list of what it took; of a graph it cut into pieces the CPU would run a part."""
    refused = trace["unsupported_nodes"]
    if refused:
        first = refused[0]
        more = f", nor {len(refused) - 1} others of {trace['summary']['total_onnx_nodes']}" if len(refused) > 1 else ""
        raise _refused(
            f"the NPU does not take {first['op_type']} ({first['reason'].rstrip('.')}){more}",
            f"{first['node_name']} in {graph.name}",
            "Export this model for the CPU, or with another block size",
        )


def _read_compiled(output: Path) -> tuple[Path, CompiledFor]:
    """The binary that the compiled graph names, and what both are for."""
    import onnx

    model = onnx.load(output, load_external_data=False)
    others = [node for node in model.graph.node if node.op_type != "EPContext"]
    if others or len(model.graph.node) != 1:
        named = others[0].name if others else f"{len(model.graph.node)} contexts"
        raise _refused("the compiled graph is not one NPU context", f"{named} in {output.name}")
    attributes = {attribute.name: attribute for attribute in model.graph.node[0].attribute}
    binary = output.with_name(attributes["ep_cache_context"].s.decode("utf-8"))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if not binary.is_file() or COMPATIBILITY_KEY not in metadata:
        raise _refused("the compiler left no binary, or none that says its chip", output)
    return binary, parse_compatibility(metadata[COMPATIBILITY_KEY], output.name)
