"""From a checkpoint to a bundle with edgephi's own graphs: the plan is carried out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

from edgephi.bundle import LONG_ROPE_ADAPTER, Manifest
from edgephi.errors import UsageError
from edgephi.export.calibrate.budget import choose_layout
from edgephi.export.calibrate.estimate import expected_seconds, machine_speed
from edgephi.export.calibrate.fit import pack_decoder
from edgephi.export.calibrate.importance import Observed, forget_importance, observe
from edgephi.export.calibrate.kv_cache import kv_tokens, settle_kv_cache, why_float
from edgephi.export.calibrate.sensitivity import forget_sensitivities, measure_sensitivities
from edgephi.export.calibrate.text import OWN_SEQUENCES, calibration_tokens, describe_text, forget_tokens
from edgephi.export.graph.block_sparse import prefill_chunk
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.genai_config import write_genai_config
from edgephi.export.graph.rope_switch import write_long_rope_adapter
from edgephi.export.graph.variants import computing_in_half, plan_variants
from edgephi.export.job import resume_key, start_job
from edgephi.export.manifest import make_manifest
from edgephi.export.options import ExportOptions
from edgephi.export.output import GRAPH_ALLOWANCE
from edgephi.export.plan import ExportPlan, make_plan
from edgephi.export.tokenizer.files import write as write_tokenizer
from edgephi.export.weights.half_range import fit_to_half
from edgephi.export.weights.pack import source_bytes, weight_source_bytes
from edgephi.quantize.registry import quantizer

WORTH_SAYING = 50_000_000
"""Parameters from which an export takes long enough to say how long."""


def export_own_graphs(options: ExportOptions) -> Manifest:
    """Export a checkpoint of edgephi's families to a bundle with graphs for the CPU and for GPUs.

    Args:
        options: validated ones; the caller has checked the output folder.

    Raises:
        EdgephiError: see `edgephi/errors.py`; nothing is left behind.
    """
    plan = make_plan(
        options.source,
        options.recipe,
        revision=options.revision,
        devices=options.devices,
        budget=options.budget,
        calibration=options.calibration_file,
        seed=options.seed,
        effort=options.effort,
        lora=options.lora,
        lora_layers=options.lora_layers,
    )
    if options.measure_elsewhere is not None and plan.observes:
        raise UsageError(
            "what weights cost is found here in one pass, and nothing of it can be measured elsewhere",
            remedy="Leave --scheduler out, or add --quantize rtn",
        )
    architecture, recipe, layout, variants = plan.architecture, plan.recipe, plan.layout, plan.variants
    mix, text = plan.mix, plan.text
    key = resume_key(
        plan.checkpoint,
        asdict(recipe),
        asdict(architecture.spec),
        asdict(layout),
        asdict(mix.budget) if mix else None,
        text.digest() if text else None,
        plan.rescale,
    )
    bytes_needed = layout.bytes + GRAPH_ALLOWANCE + plan.aside_bytes
    with (
        start_job(options, plan.checkpoint, bytes_needed=bytes_needed, key=key, keeps=(DATA_FILE,)) as job,
        ThreadPoolExecutor(1, thread_name_prefix="edgephi-graph") as aside,
    ):
        folder, journal = job.folder, job.journal
        write_genai_config(architecture.spec, plan.tokenizer, folder, prefill_chunk=prefill_chunk(architecture.spec))
        write_tokenizer(plan.tokenizer, folder)
        if architecture.spec.long_rope is not None:
            write_long_rope_adapter(folder / LONG_ROPE_ADAPTER)
        tried = sum(weight_source_bytes(architecture.weights[name]) for name in mix.weights) if mix else 0
        kv_work = 0 if why_float(options.kv_cache, variants[0]) else source_bytes(architecture)
        told = options.on_progress is not None
        job.expect(source_bytes(architecture) + tried + kv_work, *_expectation(plan, told=told))
        tokens = calibration_tokens(architecture, plan.tokenizer, text, folder, journal, job.threads) if text else None
        seen: Observed | None = None
        if tokens is not None and plan.observes:
            open_weights = mix.weights if mix else ()
            known = {name for name, matrix in layout.matrices.items() if matrix.needs_text} | set(open_weights)
            seen = observe(
                architecture,
                known,
                open_weights,
                tokens[:OWN_SEQUENCES],
                folder,
                journal,
                job.report,
                rescale=plan.rescale,
            )
        if mix and tokens is not None:
            measured = (
                seen.errors
                if seen
                else measure_sensitivities(
                    architecture, mix.weights, tokens, folder, journal, job.report, options.measure_elsewhere
                )
            )
            layout = choose_layout(architecture, recipe, mix, measured)
            variants = plan_variants(options.devices, architecture.spec, layout, recipe, variants[0].lora)
        layout = fit_to_half(architecture, replace(layout, half=computing_in_half(variants)))
        # aside, because importing onnx-ir and building the graph would keep the packing waiting for half a second
        graphs = [
            aside.submit(
                write_graph,
                architecture.spec,
                layout,
                one.recipe,
                folder / file,
                opset=one.opset,
                separate=one.separate,
                row_numbers=one.row_numbers,
                logit_rows=rows,
                lora=one.lora if rows == "chosen" else (),
            )
            for one in variants
            for rows, file in one.files.items()
        ]
        treatments = seen.treatments if seen else None
        pack_decoder(architecture, layout, tokens, folder / DATA_FILE, journal, job.threads, job.report, treatments)
        for graph in graphs:
            graph.result()
        kv_cache = settle_kv_cache(
            options.kv_cache,
            architecture.spec,
            layout,
            variants[0],
            folder,
            lambda: kv_tokens(architecture.spec, plan.tokenizer, text, tokens),
            job.part(kv_work),
        )
        if tokens is not None:
            forget_tokens(folder)
        if seen is not None:
            forget_importance(folder)
        elif mix and tokens is not None:
            forget_sensitivities(folder)
        calibration = None
        if text and tokens is not None:
            fits = seen is None or any(matrix.needs_inputs for matrix in layout.matrices.values())
            calibration = describe_text(text, tokens if fits else tokens[:OWN_SEQUENCES])
        entries = tuple(one.entry_with(kv_cache) for one in variants)
        return job.finish(make_manifest(job, plan, layout, calibration=calibration, graphs=entries, kv_cache=kv_cache))


def _expectation(plan: ExportPlan, *, told: bool) -> tuple[str, float | None]:
    """What becomes of the weights, and how long that takes where somebody is told."""
    decision = plan.recipe.decision
    if decision is None or plan.text is None:
        return "", None
    if not told or plan.parameters < WORTH_SAYING:
        return decision.picked, None
    seconds = expected_seconds(
        plan.architecture,
        quantizer(plan.recipe.quantizer),
        plan.text.sequences,
        samples=plan.text.sampled,
        mixes=plan.mix is not None,
        rescales=plan.rescale is not None,
        speed=machine_speed(),
    )
    return decision.picked, seconds
