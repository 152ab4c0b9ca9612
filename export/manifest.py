"""What an export writes down of itself: the manifest's facts, who decided the codes, how each group is stored."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import edgephi
from edgephi.bundle import (
    BudgetFacts,
    CalibrationText,
    GraphEntry,
    KvCacheChoice,
    Manifest,
    ModelFacts,
    NpuFacts,
    QuantizationChoice,
    RecipeRecord,
    Source,
    TokenizerFacts,
    WeightRecipe,
    describe_file,
)
from edgephi.export.calibrate import importance, sensitivity
from edgephi.export.calibrate.budget import Mix, describe_names
from edgephi.export.job import Job
from edgephi.export.lora import Lora
from edgephi.export.output import bundle_files
from edgephi.export.plan import ExportPlan
from edgephi.export.spec import Architecture, Checkpoint, Weight
from edgephi.export.weights.layout import ITEM_BYTES, Layout
from edgephi.export.weights.recipe import Recipe
from edgephi.quantize.quantizer import Format
from edgephi.quantize.registry import quantizer

LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "gguf", "tokenizers")
"""Libraries whose version can change the bytes of a bundle."""


def assemble_manifest(
    job: Job,
    checkpoint: Checkpoint,
    *,
    model: ModelFacts,
    recipe: RecipeRecord,
    graphs: tuple[GraphEntry, ...],
    tokenizer: TokenizerFacts,
    npu: NpuFacts | None = None,
    lora: Lora | None = None,
    exporter: Literal["edgephi", "optimum"] = "edgephi",
    libraries: Sequence[str] = (),
) -> Manifest:
    """The manifest of a folder whose files are all in place but for edgephi.json.

    Args:
        libraries: installed distributions that decide its bytes, beside `LIBRARIES`.
    """
    from importlib.metadata import version

    sources = job.source_files()
    return Manifest(
        edgephi=edgephi.__version__,
        exporter=exporter,
        versions={name: version(name) for name in (*LIBRARIES, *libraries)},
        source=Source(kind=checkpoint.kind, name=checkpoint.name, revision=checkpoint.revision, files=sources),
        model=model,
        recipe=recipe,
        graphs=graphs,
        npu=npu,
        lora=lora.facts(model, sources) if lora else None,
        tokenizer=tokenizer,
        files=tuple(describe_file(job.folder, path.name) for path in bundle_files(job.folder)),
    )


def make_manifest(
    job: Job,
    plan: ExportPlan,
    layout: Layout,
    *,
    calibration: CalibrationText | None,
    graphs: tuple[GraphEntry, ...] = (),
    npu: NpuFacts | None = None,
    kv_cache: KvCacheChoice | None = None,
) -> Manifest:
    """The manifest of a plan that was carried out, but for edgephi.json.

    Args:
        layout: the one that was used; of a mix it is not the plan's.
    """
    architecture, recipe, mix = plan.architecture, plan.recipe, plan.mix
    spec = architecture.spec
    return assemble_manifest(
        job,
        plan.checkpoint,
        model=ModelFacts(
            family=spec.family,
            hidden_size=spec.hidden_size,
            layers=spec.layers,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate_size=spec.intermediate_size,
            vocabulary_size=spec.vocabulary_size,
            context_length=spec.context_length,
            sliding_window=spec.sliding_window,
            tied_embedding=spec.tied_embedding,
            parameters=plan.parameters,
            rope_switch=spec.long_rope.switch if spec.long_rope is not None else None,
        ),
        recipe=RecipeRecord(
            precision=recipe.precision,
            accuracy_level=recipe.accuracy_level if recipe.linear is not None else None,
            quantize=quantization_choice(layout, recipe),
            rotation_seed=recipe.rotation_seed,
            budget=_budget(mix, observes=plan.observes) if mix else None,
            weights=_weight_recipes(architecture, layout, mix),
            calibration=calibration,
            kv_cache=kv_cache,
        ),
        graphs=graphs,
        npu=npu,
        lora=plan.lora,
        tokenizer=plan.tokenizer_facts,
        libraries=("onnxruntime-qnn",) if npu else (),
    )


def quantization_choice(layout: Layout, recipe: Recipe) -> QuantizationChoice | None:
    """What was asked for, what came of it and why; None where there are no 4-bit weights."""
    if recipe.decision is None:
        return None
    reason = recipe.decision.reason
    if higher := sum(matrix.keeps_higher_bits for matrix in layout.matrices.values()):
        reason += f", and {higher} in more bits, which get 8"
    return QuantizationChoice(asked=recipe.asked, picked=recipe.decision.picked, reason=reason)


def _budget(mix: Mix, *, observes: bool) -> BudgetFacts:
    measure = importance.MEASURE if observes else sensitivity.MEASURE
    return BudgetFacts(bits=mix.budget.bits, bytes=mix.budget.bytes, measure=measure if mix.weights else None)


def _weight_recipes(architecture: Architecture, layout: Layout, mix: Mix | None) -> tuple[WeightRecipe, ...]:
    """One record for each group of weights that are stored alike."""
    groups: dict[tuple[str, tuple[str, ...], Format | None], list[Weight]] = {}
    for role in ("embedding", "linear", "expert", "router", "head"):
        for weight in architecture.weights.values():
            if weight.role == role:
                matrix = layout.matrices[weight.name]
                groups.setdefault((role, matrix.repacked, matrix.number_format), []).append(weight)
    records = []
    for (role, repacked, number_format), weights in groups.items():
        matrices = [layout.matrices[weight.name] for weight in weights]
        fmt = matrices[0].format
        if repacked:
            offsets = ", whole zero points and 4-bit offsets" if matrices[0].offsets else ""
            method = f"carried over from {' and '.join(repacked)}{offsets}"
        elif number_format is None:
            method = "stored as it is"
        else:
            method = quantizer(matrices[0].quantizer).describe(number_format)
        records.append(
            WeightRecipe(
                weights=role,
                bits=fmt.bits if fmt else 8 * ITEM_BYTES[matrices[0].codes.dtype],
                block_size=fmt.block_size if fmt else None,
                symmetric=fmt.symmetric if fmt else matrices[0].channel_scales is not None or None,
                method=method,
                parameters=sum(prod(weight.shape) for weight in weights),
                stored_bytes=sum(tensor.bytes for matrix in matrices for tensor in matrix.tensors),
                names=describe_names([weight.name for weight in weights]) if mix and role == "linear" else None,
            )
        )
    return tuple(records)
