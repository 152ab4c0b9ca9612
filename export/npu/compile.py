"""Graphs of fixed shape become context binaries, in a child process, and nothing the child says is believed unread.

onnxruntime writes the uncompiled graph when nothing was compiled, splits a graph at a node the NPU does not take, and
crashes with the compiler. Each of these is an error here that names the node, or else the graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgephi.child import call
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
    require_new(output)
    options = compile_options(target, write_affinity(work), work.absolute())
    arguments = {"graph": str(graph.absolute()), "output": str(output.absolute()), "options": options}
    report = call_compiler("edgephi.export.npu.compile_child:compile_graph", arguments, graph.name)
    nodes = require_taken(graph, work / TRACE, report["refusal"])
    binary, built_for = read_compiled(output)
    require_asked_chip(built_for, target, graph)
    return Compiled(output, binary, nodes, built_for, float(report["seconds"]), int(report["peak_bytes"]))


def require_taken(graph: Path, trace: Path, refusal: str | None) -> int:
    """Nodes of a graph that the compiler took: all of them.

    Args:
        trace: where its list of operators is, if it got so far.
        refusal: what onnxruntime said instead of compiling.

    Raises:
        DeviceError: step `nodes`: some node, or else the graph, was refused.
    """
    seen = read_trace(trace)
    if seen is not None:
        require_all_nodes(seen, graph)
    if refusal is not None or seen is None:
        said = refusal or "it does not say which operators it took"
        raise refused(f"the NPU's compiler refused the graph: {said}", graph.name)
    return int(seen["summary"]["supported_nodes"])


def require_new(output: Path) -> None:
    """Raises DeviceError when a file that compiling would write is there already."""
    for path in (output, output.with_name(f"{output.stem}_qnn.bin")):
        if path.exists():
            raise refused("the file to compile to exists", path, "Choose another --output")


def write_affinity(work: Path) -> Path:
    """The file that `compile_options` wants."""
    path = work / "op_affinity.json"
    path.write_text(json.dumps(AFFINITY), encoding="utf-8")
    return path.absolute()


def require_asked_chip(built_for: CompiledFor, target: HexagonTarget, graph: Path) -> None:
    """Raises DeviceError when a compiled graph is for another chip than the target."""
    if (built_for.htp_arch, built_for.soc_model) != (target.htp_arch, target.soc_model):
        raise refused(
            f"the compiler built for v{built_for.htp_arch}, chip {built_for.soc_model}, and was asked for "
            f"v{target.htp_arch}, chip {target.soc_model}",
            graph.name,
            "Install the version of onnxruntime-qnn that edgephi names",
        )


def call_compiler(function: str, arguments: Mapping[str, object], where: str) -> dict[str, Any]:
    """Call what compiles in a child process, and return its report.

    Raises:
        DeviceError: its own, or step `process`: it crashed or took too long.
    """
    try:
        report = call(function, arguments, timeout_s=COMPILING_S, where=where)
    except DeviceError as error:
        if error.step != "process":
            raise
        raise DeviceError(
            f"the NPU's compiler did not finish: {error.what}",
            where=where,
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


def refused(what: str, where: object, remedy: str = _REPORT_IT) -> DeviceError:
    """The compiler did not do what it was asked for."""
    return DeviceError(what, where=where, remedy=remedy, step="nodes")


def read_trace(path: Path) -> dict[str, Any] | None:
    """The provider's account of the operators it took; None: it left none."""
    if not path.is_file():
        return None
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trace


def require_all_nodes(trace: dict[str, Any], graph: Path) -> None:
    """The compiler's own list of what it took; of a graph it cut into pieces the CPU would run a part."""
    left_out = trace["unsupported_nodes"]
    if left_out:
        first, others = left_out[0], len(left_out) - 1
        more = f", nor {others} others of {trace['summary']['total_onnx_nodes']}" if others else ""
        raise refused(
            f"the NPU does not take {first['op_type']} ({first['reason'].rstrip('.')}){more}",
            f"{first['node_name']} in {graph.name}",
            "Export this model for the CPU, or with another block size",
        )


def read_compiled(output: Path) -> tuple[Path, CompiledFor]:
    """The binary that the compiled graph names, and what both are for."""
    import onnx

    model = onnx.load(output, load_external_data=False)
    others = [node for node in model.graph.node if node.op_type != "EPContext"]
    if others or len(model.graph.node) != 1:
        named = others[0].name if others else f"{len(model.graph.node)} contexts"
        raise refused("the compiled graph is not one NPU context", f"{named} in {output.name}")
    attributes = {attribute.name: attribute for attribute in model.graph.node[0].attribute}
    binary = output.with_name(attributes["ep_cache_context"].s.decode("utf-8"))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if not binary.is_file() or COMPATIBILITY_KEY not in metadata:
        raise refused("the compiler left no binary, or none that says its chip", output)
    return binary, parse_compatibility(metadata[COMPATIBILITY_KEY], output.name)
