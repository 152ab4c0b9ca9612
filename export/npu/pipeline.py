"""One call from SOURCE to a bundle for a Hexagon NPU."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from edgephi.bundle import Manifest, NpuFacts
from edgephi.devices.hexagon import HexagonTarget, installed_qairt
from edgephi.export.calibrate.layer import layer_bytes
from edgephi.export.calibrate.text import calibration_tokens, describe_text, extra_disk, forget_tokens
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.job import resume_key, start_job
from edgephi.export.manifest import make_manifest
from edgephi.export.npu.compile import require_compiler
from edgephi.export.npu.compile_stages import compile_stages
from edgephi.export.npu.decoder import NpuDecoder, npu_decoder, stages
from edgephi.export.npu.layers import DEFAULT_NUMERICS, pack_layers, plan_layers
from edgephi.export.npu.pipeline_config import EMBEDDING_FILE, HEAD_FILE, stage_file, write_pipeline_config
from edgephi.export.npu.static_graph import Stage, embedding_graph, head_graph
from edgephi.export.npu.token_graph import LAYERS_DATA, token_graph
from edgephi.export.options import ExportOptions
from edgephi.export.output import GRAPH_ALLOWANCE
from edgephi.export.plan import make_plan
from edgephi.export.tokenizer.files import write as write_tokenizer
from edgephi.export.weights.half_range import fit_to_half
from edgephi.export.weights.layout import Layout, plan_storage
from edgephi.export.weights.pack import pack_weights, source_bytes
from edgephi.export.weights.recipe import Recipe

COMPUTES = "the NPU's graphs compute"
"""In float16 between layers, norms and embeddings included, whatever the weights are; for messages."""
WORK = "uncompiled"
"""Folder of the layers' weights and graphs until they are compiled; it does not stay."""


def export_for_npu(options: ExportOptions, target: HexagonTarget) -> Manifest:
    """Export a checkpoint with its layers compiled for a Hexagon NPU; embedding and head stay on the CPU.

    In float16, rounded 4-bit blocks are those of the CPU's bundle. w4a16 has scales of two levels, and calibration text
    gives the ranges of activations. GPTQ fits the layers in the form in which the NPU computes them.

    Args:
        options: validated ones; the caller has checked the output folder. Without `npu_numerics` they are w4a16, or
            float16 where tokens are computed on the CPU, which has no other.
        target: the chip.

    Raises:
        EdgephiError: see `edgephi/errors.py`; nothing is left behind.
    """
    import onnx_ir as ir

    numerics, share_weights = options.npu_numerics, options.npu_share_weights
    if numerics is None:
        numerics = DEFAULT_NUMERICS if target.tokens_on == "npu" else "float16"
    require_compiler()
    plan = make_plan(
        options.source,
        options.recipe,
        revision=options.revision,
        devices=("cpu",),
        budget=None,
        calibration=options.calibration_file,
        seed=options.seed,
        effort=options.effort,
        npu=numerics,
    )
    architecture, recipe, text = plan.architecture, plan.recipe, plan.text
    decoder = npu_decoder(architecture, target)
    outer, inner = plan_storage(decoder.outer, recipe), plan_layers(decoder, recipe, numerics)
    layout = Layout(outer.matrices | inner.matrices, outer.vectors | inner.vectors, outer.bytes + inner.bytes)
    # the layers' weights once for the compiler, and once in each phase's binaries
    bytes_needed = outer.bytes + 3 * inner.bytes + (extra_disk(architecture, text) if text else 0) + GRAPH_ALLOWANCE
    key = resume_key(
        plan.checkpoint,
        asdict(recipe),
        asdict(architecture.spec),
        asdict(layout),
        f"{target} {installed_qairt()} {numerics} {share_weights} {text.digest() if text else None}",
    )
    spec = decoder.inner.spec
    planned = stages(spec, target, decoder.cache_rows)
    tokens_on_cpu = Stage(0, spec.layers, 1, decoder.cache_rows) if target.tokens_on == "cpu" else None
    kept = (DATA_FILE, LAYERS_DATA, WORK)
    with start_job(options, plan.checkpoint, bytes_needed=bytes_needed, key=key, keeps=kept) as job:
        folder, journal = job.folder, job.journal
        work = folder / WORK
        work.mkdir(exist_ok=True)
        if (folder / LAYERS_DATA).exists():  # an export was interrupted after its last stage
            (folder / LAYERS_DATA).replace(work / DATA_FILE)
        write_tokenizer(plan.tokenizer, folder)
        all_stages = (*planned, tokens_on_cpu) if tokens_on_cpu else planned
        write_pipeline_config(spec, plan.tokenizer, all_stages, target, folder, shared=share_weights)
        # compiling a stage counts as reading its layers once more: both grow with the weights
        to_compile = sum(layer_bytes(decoder.inner, stage.layers) for stage in planned)
        to_measure = layer_bytes(decoder.whole, range(spec.layers)) if numerics == "w4a16" else 0
        job.expect(source_bytes(architecture) + to_measure + to_compile)
        outer = fit_to_half(decoder.outer, replace(outer, half=COMPUTES))
        inner = fit_to_half(decoder.inner, replace(inner, half=COMPUTES))
        tokens = calibration_tokens(architecture, plan.tokenizer, text, folder, journal, job.threads) if text else None
        pack_weights(decoder.outer, outer, folder / DATA_FILE, journal, job.threads, job.report)
        build = pack_layers(decoder, inner, recipe, numerics, tokens, work, journal, job.threads, job.report)
        _write_outer_graphs(decoder, outer, recipe, folder)
        job.begin("compiling")
        compiled, qairt = compile_stages(
            decoder.inner,
            planned,
            build,
            target,
            job,
            work,
            lambda stage: job.report(layer_bytes(decoder.inner, stage.layers)),
            shared=share_weights,
        )
        if tokens_on_cpu:
            ir.save(token_graph(spec, inner, recipe, tokens_on_cpu), folder / stage_file(tokens_on_cpu))
            (work / DATA_FILE).replace(folder / LAYERS_DATA)
        shutil.rmtree(work)
        if tokens is not None:
            forget_tokens(folder)
        calibration = describe_text(text, tokens) if text and tokens is not None else None
        facts = NpuFacts(
            target=target.name,
            numerics=numerics,
            kv_cache="uint8" if numerics == "w4a16" else "float16",
            htp_arch=target.htp_arch,
            soc_model=target.soc_model,
            qairt=qairt,
            chunk=target.chunk,
            cache_rows=decoder.cache_rows,
            context_length=decoder.context_length,
            embedding=EMBEDDING_FILE,
            head=HEAD_FILE,
            stages=compiled,
            token_graph=stage_file(tokens_on_cpu) if tokens_on_cpu else None,
            shares_weights=share_weights,
        )
        return job.finish(make_manifest(job, plan, layout, calibration=calibration, npu=facts))


def _write_outer_graphs(decoder: NpuDecoder, layout: Layout, recipe: Recipe, folder: Path) -> None:
    import onnx_ir as ir

    spec = decoder.outer.spec
    ir.save(embedding_graph(spec, layout, recipe), folder / EMBEDDING_FILE)
    ir.save(head_graph(spec, layout, recipe), folder / HEAD_FILE)
