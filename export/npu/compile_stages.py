"""Every stage of a model is compiled, and an interrupted export does none of them twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgephi.bundle import NpuProof, NpuStage
from edgephi.devices.hexagon import HexagonTarget
from edgephi.errors import DeviceError
from edgephi.export.calibrate.layer import layer_weights
from edgephi.export.job import Job
from edgephi.export.journal import Journal
from edgephi.export.npu.compile import Compiled, compile_stage
from edgephi.export.npu.compile_pair import compile_pair
from edgephi.export.npu.pipeline_config import stage_file
from edgephi.export.npu.static_graph import Stage
from edgephi.export.spec import Architecture

if TYPE_CHECKING:
    import onnx_ir as ir

COMPILED = "compiled "
"""What begins the journal's line for stages whose binary is whole."""

PROVEN_WEIGHTS = 200_000_000
"""Pairs that share a binary run beside the CPU until so many weights did, at least one pair: simulating a layer of
Phi-4-mini takes half a minute."""


def compile_stages(
    layers: Architecture,
    planned: Sequence[Stage],
    build: Callable[[Stage], ir.Model],
    target: HexagonTarget,
    job: Job,
    work: Path,
    on_compiled: Callable[[Stage], None],
    *,
    shared: bool,
) -> tuple[tuple[NpuStage, ...], str]:
    """Build and compile stages.

    Args:
        layers: what the stages are of.
        job: whose folder gets compiled graphs and binaries.
        work: for graphs to compile; the weights they read are there.
        shared: the prompt's and the token's stage of the same layers share a binary.

    Returns:
        The manifest's record of each stage, in the order planned, and the QAIRT that compiled them all.

    Raises:
        DeviceError: as `compile_stage` and `compile_pair`.
    """
    folder = job.folder
    records, versions = _already(job.journal, folder)
    proven = 0
    for together in _units(planned, shared):
        if not all(stage.name in records for stage in together):
            graphs = [_write(build(stage), work / stage_file(stage)) for stage in together]
            outputs = [folder / stage_file(stage) for stage in together]
            for output in outputs:  # an interrupted export may have left them, whole or not
                for stale in (output, output.with_name(f"{output.stem}_qnn.bin")):
                    stale.unlink(missing_ok=True)
            with TemporaryDirectory(prefix="compile-", dir=work) as scratch:
                found: tuple[tuple[Compiled, NpuProof | None], ...]
                if shared:
                    pair = ((graphs[0], graphs[1]), (outputs[0], outputs[1]))
                    found = compile_pair(*pair, target, Path(scratch), prove=proven < PROVEN_WEIGHTS)
                else:
                    found = ((compile_stage(graphs[0], outputs[0], target, Path(scratch)), None),)
            done = [_record(stage, *one) for stage, one in zip(together, found, strict=True)]
            version = found[0][0].built_for.qairt
            records |= {stage.name: stage for stage in done}
            versions.add(version)
            line = {"qairt": version, "stages": [stage.model_dump(mode="json") for stage in done]}
            files = {name for stage in done for name in (stage.graph, stage.binary)}
            job.journal.add_files(COMPILED + json.dumps(line), folder, *sorted(files))
        proven += sum(
            prod(weight.shape) for layer in together[0].layers for weight in layer_weights(layers, layer).values()
        )
        for stage in together:
            on_compiled(stage)
    if len(versions) != 1:
        raise DeviceError(
            "the compiler changed its version", where=", ".join(sorted(versions)), remedy="Export again", step="library"
        )
    return tuple(records[stage.name] for stage in planned), versions.pop()


def _units(planned: Sequence[Stage], shared: bool) -> list[tuple[Stage, ...]]:
    """Stages that are compiled together."""
    if not shared:
        return [(stage,) for stage in planned]
    prompts = [stage for stage in planned if stage.tokens > 1]
    tokens = [stage for stage in planned if stage.tokens == 1]
    return list(zip(prompts, tokens, strict=True))


def _already(journal: Journal, folder: Path) -> tuple[dict[str, NpuStage], set[str]]:
    """What an export that was interrupted compiled and left unchanged: stages by name, and the versions of QAIRT."""
    records, versions = dict[str, NpuStage](), set[str]()
    for line in journal.done:
        if line.startswith(COMPILED):
            try:
                found = json.loads(line.removeprefix(COMPILED))
                stages = [NpuStage.model_validate_json(json.dumps(stage)) for stage in found["stages"]]
                version = str(found["qairt"])
            except (ValueError, KeyError, TypeError, RecursionError):  # no line of ours: the stages are compiled anew
                continue
            files = {name for stage in stages for name in (stage.graph, stage.binary)}
            if journal.holds_files(line, folder, *files):
                records |= {stage.name: stage for stage in stages}
                versions.add(version)
    return records, versions


def _write(model: ir.Model, path: Path) -> Path:
    import onnx_ir as ir

    ir.save(model, path)
    return path


def _record(stage: Stage, compiled: Compiled, proof: NpuProof | None) -> NpuStage:
    return NpuStage(
        name=stage.name,
        phase="decode" if stage.tokens == 1 else "prefill",
        first_layer=stage.first,
        last_layer=stage.last,
        graph=compiled.graph.name,
        binary=compiled.binary.name,
        nodes=compiled.nodes,
        compile_seconds=round(compiled.seconds, 3),
        compile_peak_bytes=compiled.peak_bytes,
        proof=proof,
    )
