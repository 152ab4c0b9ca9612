"""A prompt graph and a token graph of the same layers in one binary, which holds their weights once.

onnxruntime-qnn shares a binary between sessions that live in one process; the last one writes it. The sessions that
compiled can run, on x86 in QAIRT's simulator. The simulator does not load such a binary again (QAIRT 2.51:
QNN_COMMON_ERROR_NOT_SUPPORTED), so what the pair computes is compared with the CPU before the process ends, or never.

Source: onnxruntime, docs/execution-providers/QNN-ExecutionProvider.md, "QNN context binary weight sharing".
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgephi.bundle import NpuProof
from edgephi.devices.hexagon import SHARE_CONTEXTS, HexagonTarget, compile_options
from edgephi.errors import DeviceError, EngineError
from edgephi.export.npu.compile import (
    TRACE,
    Compiled,
    call_compiler,
    read_compiled,
    refused,
    require_asked_chip,
    require_new,
    require_taken,
    write_affinity,
)
from edgephi.export.npu.numbers import compare
from edgephi.ort import ERRORS, open_session, session_options

LARGEST_ERROR = 0.1
"""Of hidden states and cache, relative to the CPU's; another graph is off by 1. Rounding to float16 makes up to 0.018
on the layers of SmolLM2-135M, and 0.005 on small random ones."""


def compile_pair(
    graphs: tuple[Path, Path], outputs: tuple[Path, Path], target: HexagonTarget, work: Path, *, prove: bool
) -> tuple[tuple[Compiled, NpuProof | None], ...]:
    """Compile a prompt graph and a token graph of the same layers; the binary lies beside the first output.

    Args:
        graphs: ONNX files, every dimension a number; the prompt's first.
        outputs: the ONNX files to make.
        work: an empty folder for what the child leaves.
        prove: run both and compare them with the CPU.

    Raises:
        DeviceError: as `compile_stage`; or the pair computes something else than the CPU.
    """
    for output in outputs:
        require_new(output)
    traces = tuple(work / str(index) for index in range(2))
    for trace in traces:
        trace.mkdir()
    affinity = write_affinity(work)
    options = [compile_options(target, affinity, trace.absolute()) for trace in traces]
    report = call_compiler(
        "edgephi.export.npu.compile_pair:compile_in_one_process",
        {
            "graphs": [str(path.absolute()) for path in graphs],
            "outputs": [str(path.absolute()) for path in outputs],
            "options": options,
            "prove": prove,
        },
        " and ".join(path.name for path in graphs),
    )
    if report["refusal"] is not None:
        index = report["refused"]
        require_taken(graphs[index], traces[index] / TRACE, report["refusal"])
    found = []
    for index, (graph, output) in enumerate(zip(graphs, outputs, strict=True)):
        nodes = require_taken(graph, traces[index] / TRACE, None)
        binary, built_for = read_compiled(output)
        require_asked_chip(built_for, target, graph)
        compiled = Compiled(output, binary, nodes, built_for, report["seconds"][index], report["peak_bytes"])
        found.append((compiled, NpuProof.model_validate(report["proofs"][index]) if prove else None))
    if found[0][0].binary != found[1][0].binary:
        raise refused("the compiler wrote two binaries where one was asked for", graphs[0].name)
    for compiled, proof in found:
        if proof is not None and max(proof.hidden_error, proof.cache_error) > LARGEST_ERROR:
            raise DeviceError(
                f"the shared binary computes something else than the CPU: hidden states are {proof.hidden_error:.2g} "
                f"off, keys and values {proof.cache_error:.2g}",
                where=compiled.graph.name,
                remedy="Export without --npu-share-weights, and report the model and this message to edgephi",
                step="graph",
            )
    return tuple(found)


def compile_in_one_process(
    graphs: Sequence[str], outputs: Sequence[str], options: Sequence[Mapping[str, str]], prove: bool
) -> dict[str, object]:
    """What runs in the child: sessions that share a binary, all alive until the last is made.

    Returns:
        `refusal` (what onnxruntime said, or None) and `refused` (which graph), `seconds` of each graph, `peak_bytes` of
        this process while it compiled, and `proofs`: an NpuProof's values for each graph, or None.

    Raises:
        DeviceError: the provider is missing.
    """
    from edgephi.devices.memory import peak_resident_bytes
    from edgephi.devices.providers import register

    device = register("qnn")[0]
    sessions: list[Any] = []
    seconds: list[float] = []
    for index, (graph, output) in enumerate(zip(graphs, outputs, strict=True)):
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": output,
            SHARE_CONTEXTS: "1",
        }
        if index + 1 == len(graphs):
            entries["ep.stop_share_ep_contexts"] = "1"
        settings = session_options(
            device=device.raw, device_options=options[index], cpu_fallback=False, log_level=ERRORS, entries=entries
        )
        started = time.perf_counter()
        try:
            session = open_session(graph, settings, where=graph, remedy="Export for the CPU")
        except EngineError as error:
            return {"refusal": error.what, "refused": index}
        seconds.append(time.perf_counter() - started)
        sessions.append(session)
    peak = peak_resident_bytes()
    proofs = compare(sessions, graphs, str(device.kind)) if prove else None
    return {"refusal": None, "seconds": seconds, "peak_bytes": peak, "proofs": proofs}
