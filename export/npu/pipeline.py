"""One call from SOURCE to a bundle for a Hexagon NPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgephi.bundle import Manifest, NpuFacts, NpuNumerics, NpuStage, write_manifest
from edgephi.devices.hexagon import HexagonTarget
from edgephi.errors import DeviceError, UsageError
from edgephi.export.calibrate import calibration_tokens, describe_text, extra_disk, forget_tokens
from edgephi.export.emitter import DATA_FILE
from edgephi.export.npu.compile import Compiled, compile_stage, require_compiler
from edgephi.export.npu.decoder import NpuDecoder, npu_decoder, stages
from edgephi.export.npu.layers import DEFAULT_NUMERICS, pack_layers, plan_layers
from edgephi.export.npu.pipeline_config import EMBEDDING_FILE, HEAD_FILE, stage_file, write_pipeline_config
from edgephi.export.npu.static_graph import Stage, embedding_graph, head_graph
from edgephi.export.output import check_disk, staged
from edgephi.export.pack import pack_weights, source_bytes, weight_source_bytes
from edgephi.export.pipeline import GRAPH_ALLOWANCE, Progress, Reporter, export_key, source_hashes
from edgephi.export.plan import make_plan
from edgephi.export.record import make_manifest
from edgephi.export.recorded_layer import layer_weights
from edgephi.export.storage import Layout, Recipe, plan_storage
from edgephi.export.tokenizer_files import write as write_tokenizer

if TYPE_CHECKING:
    import onnx_ir as ir

WORK = "uncompiled"
"""Folder of the layers' weights and graphs until they are compiled; it does not stay."""


def export_for_npu(
    source: str | Path,
    output: Path,
    recipe: Recipe,
    target: HexagonTarget,
    *,
    numerics: NpuNumerics = DEFAULT_NUMERICS,
    revision: str | None = None,
    calibration: Path | None = None,
    seed: int = 0,
    force: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Export a checkpoint with its layers compiled for a Hexagon NPU; embedding and head stay on the CPU.

    In float16, rounded 4-bit blocks are those of the CPU's bundle. w4a16 has scales of two levels, and calibration text
    gives the ranges of activations. GPTQ fits the layers in the form in which the NPU computes them.

    Args:
        output: folder to make; the caller has checked it.
        recipe: an int4 one, for the CPU.
        calibration: text for GPTQ and w4a16; None: the model samples its own, with this `seed`.

    Raises:
        EdgephiError: see `edgephi/errors.py`; nothing is left behind.
    """
    _require_recipe(recipe)
    require_compiler()
    plan = make_plan(
        source,
        recipe,
        revision=revision,
        devices=("cpu",),
        budget=None,
        calibration=calibration,
        seed=seed,
        integers=numerics == "w4a16",
    )
    architecture, recipe, text = plan.architecture, plan.recipe, plan.text
    decoder = npu_decoder(architecture, target)
    outer, inner = plan_storage(decoder.outer, recipe), plan_layers(decoder, recipe, numerics)
    aside_bytes = extra_disk(architecture, text) if text else 0
    # the layers' weights once for the compiler, and once in each phase's binaries
    check_disk(output, outer.bytes + 3 * inner.bytes + aside_bytes + GRAPH_ALLOWANCE)
    layout = Layout(outer.matrices | inner.matrices, outer.vectors | inner.vectors, outer.bytes + inner.bytes)
    key = export_key(
        plan.checkpoint,
        architecture,
        recipe,
        layout,
        None,
        f"{target.name} {numerics} {text.digest() if text else None}",
    )
    threads = min(4, os.cpu_count() or 1)
    spec = decoder.inner.spec
    planned = stages(spec, target, decoder.cache_rows)
    with staged(output, force, key) as (folder, journal), source_hashes(plan.checkpoint.files) as source_files:
        work = folder / WORK
        work.mkdir(exist_ok=True)
        write_tokenizer(plan.tokenizer, folder)
        write_pipeline_config(spec, plan.tokenizer, planned, target, folder)
        to_compile = sum(_stage_bytes(stage, decoder) for stage in planned)
        reporter = Reporter(source_bytes(architecture) + to_compile, on_progress)
        tokens = calibration_tokens(architecture, plan.tokenizer, text, folder, journal, threads) if text else None
        pack_weights(decoder.outer, outer, folder / DATA_FILE, journal, threads, reporter)
        build = pack_layers(decoder, inner, recipe, numerics, tokens, work, journal, threads, reporter)
        _write_outer_graphs(decoder, outer, recipe, folder)
        compiled = []
        for stage in planned:
            compiled.append((stage, _compile(stage, build(stage), target, folder)))
            reporter(_stage_bytes(stage, decoder))
        shutil.rmtree(work)
        if tokens is not None:
            forget_tokens(folder)
        record = describe_text(text, tokens) if text and tokens is not None else None
        facts = _facts(decoder, target, numerics, compiled)
        manifest = make_manifest(
            plan.checkpoint,
            architecture,
            layout,
            recipe,
            folder,
            source_files(),
            record,
            plan.parameters,
            (),
            npu=facts,
        )
        write_manifest(folder, manifest)
    return manifest


def _require_recipe(recipe: Recipe) -> None:
    if recipe.linear is None or recipe.linear.bits != 4:
        raise UsageError("graphs for the NPU have int4 weights", remedy="Leave --precision out")
    if recipe.linear.block_size > 128:
        raise UsageError("the NPU takes blocks of up to 128", remedy="Choose --block-size 16, 32, 64 or 128")


def _stage_bytes(stage: Stage, decoder: NpuDecoder) -> int:
    """Compiling a stage counts as reading its layers once more: both grow with the weights."""
    return sum(
        weight_source_bytes(weight) for layer in stage.layers for weight in layer_weights(decoder.inner, layer).values()
    )


def _write_outer_graphs(decoder: NpuDecoder, layout: Layout, recipe: Recipe, folder: Path) -> None:
    import onnx_ir as ir

    spec = decoder.outer.spec
    ir.save(embedding_graph(spec, layout, recipe), folder / EMBEDDING_FILE)
    ir.save(head_graph(spec, layout, recipe), folder / HEAD_FILE)


def _compile(stage: Stage, model: ir.Model, target: HexagonTarget, folder: Path) -> Compiled:
    import onnx_ir as ir

    graph, output = folder / WORK / stage_file(stage), folder / stage_file(stage)
    ir.save(model, graph)
    # an interrupted export may have left them, whole or not
    for stale in (output, output.with_name(f"{output.stem}_qnn.bin")):
        stale.unlink(missing_ok=True)
    with TemporaryDirectory(prefix="compile-", dir=folder / WORK) as work:
        return compile_stage(graph, output, target, Path(work))


def _facts(
    decoder: NpuDecoder, target: HexagonTarget, numerics: NpuNumerics, compiled: list[tuple[Stage, Compiled]]
) -> NpuFacts:
    qairt = {result.built_for.qairt for _, result in compiled}
    if len(qairt) != 1:
        raise DeviceError(
            "the compiler changed its version", where=", ".join(sorted(qairt)), remedy="Export again", step="library"
        )
    return NpuFacts(
        target=target.name,
        numerics=numerics,
        kv_cache="uint8" if numerics == "w4a16" else "float16",
        htp_arch=target.htp_arch,
        soc_model=target.soc_model,
        qairt=qairt.pop(),
        chunk=target.chunk,
        cache_rows=decoder.cache_rows,
        context_length=decoder.context_length,
        embedding=EMBEDDING_FILE,
        head=HEAD_FILE,
        stages=tuple(
            NpuStage(
                name=stage.name,
                phase="decode" if stage.tokens == 1 else "prefill",
                first_layer=stage.first,
                last_layer=stage.last,
                graph=result.graph.name,
                binary=result.binary.name,
                nodes=result.nodes,
                compile_seconds=round(result.seconds, 3),
                compile_peak_bytes=result.peak_bytes,
            )
            for stage, result in compiled
        ),
    )
