"""What an export writes down of itself: the manifest's facts, who decided the codes, how each group is stored."""

from __future__ import annotations

from math import prod
from pathlib import Path

import edgephi
from edgephi.bundle import (
    BudgetFacts,
    CalibrationText,
    FileEntry,
    GraphEntry,
    KvCacheChoice,
    Manifest,
    ModelFacts,
    NpuFacts,
    QuantizationChoice,
    Source,
    TokenizerFacts,
    WeightRecipe,
    describe_file,
)
from edgephi.bundle import Recipe as RecipeRecord
from edgephi.export.calibrate.budget import Mix, describe_names
from edgephi.export.calibrate.gptq import takes_gptq
from edgephi.export.calibrate.sensitivity import MEASURE
from edgephi.export.output import bundle_files
from edgephi.export.spec import Architecture, Checkpoint, Weight
from edgephi.export.weights.layout import ITEM_BYTES, Layout, Recipe
from edgephi.export.weights.repack import BESIDE, is_finer
from edgephi.quantize import BlockFormat

LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "gguf", "tokenizers")
"""Libraries whose version can change the bytes of a bundle."""


def make_manifest(
    checkpoint: Checkpoint,
    architecture: Architecture,
    layout: Layout,
    recipe: Recipe,
    folder: Path,
    source_files: tuple[FileEntry, ...],
    calibration: CalibrationText | None,
    parameters: int,
    graphs: tuple[GraphEntry, ...],
    mix: Mix | None = None,
    npu: NpuFacts | None = None,
    tokenizer: TokenizerFacts | None = None,
    kv_cache: KvCacheChoice | None = None,
) -> Manifest:
    """The manifest of a folder whose files are all in place but for edgephi.json; `parameters` as published."""
    from importlib.metadata import version

    spec = architecture.spec
    return Manifest(
        edgephi=edgephi.__version__,
        versions={name: version(name) for name in (*LIBRARIES, *(("onnxruntime-qnn",) if npu else ()))},
        source=Source(kind=checkpoint.kind, name=checkpoint.name, revision=checkpoint.revision, files=source_files),
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
            parameters=parameters,
            rope_switch=spec.long_rope.switch if spec.long_rope is not None else None,
        ),
        recipe=RecipeRecord(
            precision=recipe.precision,
            accuracy_level=recipe.accuracy_level if recipe.linear is not None else None,
            quantize=quantization_choice(architecture, layout, recipe),
            rotation_seed=recipe.rotation_seed,
            budget=_budget(mix) if mix else None,
            weights=_weight_recipes(architecture, layout, recipe, mix),
            calibration=calibration,
            kv_cache=kv_cache,
        ),
        graphs=graphs,
        npu=npu,
        tokenizer=tokenizer,
        files=tuple(describe_file(folder, path.name) for path in bundle_files(folder)),
    )


def quantization_choice(architecture: Architecture, layout: Layout, recipe: Recipe) -> QuantizationChoice | None:
    """What was asked for, what came of it and why; None where there are no 4-bit weights."""
    if recipe.linear is None or recipe.linear.bits != 4:
        return None
    two_levels = any(matrix.channel_scales is not None for matrix in layout.matrices.values())
    if recipe.quantize == "rtn":
        return QuantizationChoice(asked="rtn", picked="rounded to nearest", reason="asked for")
    weights = architecture.weights.values()
    if recipe.quantize == "gptq":
        experts = any(weight.role == "expert" for weight in weights)
        picked = "GPTQ, experts rounded to nearest" if experts else "GPTQ"
        reason = "asked for"
        if recipe.asked == "auto":
            reason = "the source holds float weights, and of all ways measured it loses least at a size"
            if two_levels:
                reason = "no source has the NPU's scales of two levels, and of all ways measured it loses least"
        return QuantizationChoice(asked=recipe.asked, picked=picked, reason=reason)
    linear = [weight for weight in weights if weight.role in ("linear", "expert")]
    carried = sum(1 for weight in linear if layout.matrices[weight.name].carried)
    if carried == len(linear):
        picked, reason = "carried over", "the source holds every linear weight in 4-bit blocks of 32"
    elif carried:
        picked = "carried over, the rest rounded to nearest"
        reason = f"the source holds {carried} of {len(linear)} linear weights in 4-bit blocks of 32"
        if finer := sum(1 for one in linear if is_finer(one) and layout.matrices[one.name].format == BESIDE):
            reason += f", and {finer} in more bits, which get 8"
    else:
        picked = "rounded to nearest"
        reason = "the quick way; --quantize gptq loses less and takes hours on a large model"
    return QuantizationChoice(asked="auto", picked=picked, reason=reason)


def _budget(mix: Mix) -> BudgetFacts:
    return BudgetFacts(bits=mix.budget.bits, bytes=mix.budget.bytes, measure=MEASURE if mix.weights else None)


def _weight_recipes(
    architecture: Architecture, layout: Layout, recipe: Recipe, mix: Mix | None
) -> tuple[WeightRecipe, ...]:
    """One record for each group of weights that are stored alike."""
    groups: dict[tuple[str, tuple[str, ...], BlockFormat | None], list[Weight]] = {}
    for role in ("embedding", "linear", "expert", "router", "head"):
        for weight in architecture.weights.values():
            if weight.role == role:
                matrix = layout.matrices[weight.name]
                groups.setdefault((role, matrix.carried, matrix.format), []).append(weight)
    records = []
    for (role, carried, fmt), weights in groups.items():
        matrices = [layout.matrices[weight.name] for weight in weights]
        method = "round to nearest, scale searched" if fmt else "stored as it is"
        if recipe.quantize == "gptq" and takes_gptq(weights[0], layout):
            method = "GPTQ"
        if matrices[0].channel_scales is not None:
            method = "round to nearest" if fmt is None else f"{method}, scales of two levels"
        if carried:
            offsets = ", whole zero points and 4-bit offsets" if matrices[0].means else ""
            method = f"carried over from {' and '.join(carried)}{offsets}"
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
