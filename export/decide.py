"""What becomes of a model's int4 weights when the user leaves it to `auto`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from edgephi.bundle import NpuNumerics
from edgephi.errors import UsageError
from edgephi.export.calibrate.budget import MIXED_BLOCKS, Budget, llama_cpp_bytes, plan_mix
from edgephi.export.spec import Architecture, Weight
from edgephi.export.weights.recipe import Decision, Recipe, decided_by, expert_format, repacks_any
from edgephi.export.weights.repack import repackable_types
from edgephi.export.weights.rescaling import Rule
from edgephi.quantize.registry import AUTO, FITTING, ROUNDING, WEIGHTED, needs_text, quantizer

Effort = Literal["fast", "balanced", "best"]
"""Of `auto` with float weights: seconds to minutes, minutes, minutes to hours. Experts are always rounded."""

FITTED_UP_TO = 1_000_000_000
"""Parameters up to which the default effort fits rotated weights and those of an NPU: minutes on two cores."""


def decide(
    recipe: Recipe,
    architecture: Architecture,
    effort: Effort,
    budget: Budget | None,
    *,
    npu: NpuNumerics | None = None,
    adapters: bool = False,
    whole_blocks: bool = False,
) -> tuple[Recipe, Budget | None]:
    """The recipe with the decision about its int4 weights, `auto` settled, and the budget that goes with it.

    `auto` keeps the 4-bit blocks of the source, if it has any. What else there is, it rounds by importance (fast), with
    a size for every weight so that all together take what llama.cpp's Q4_K_M does (balanced), or fits by GPTQ within
    the same size (best).

    Args:
        budget: the user's, which comes first.
        npu: of graphs for an NPU; nothing is repacked for w4a16, and weights are rounded or fitted in one size.
        adapters: the graph takes LoRA, so that no channel is rescaled.
        whole_blocks: see `plan_mix`.
    """
    if recipe.linear is None or recipe.linear.bits != 4:
        return recipe, budget
    if recipe.asked != AUTO:
        return _with_reason(recipe, architecture, "asked for", npu, adapters), budget
    linear = [weight for weight in architecture.weights.values() if weight.role in ("linear", "expert")]
    if npu != "w4a16" and repacks_any(recipe, architecture):
        return replace(recipe, decision=_repacked(linear)), budget
    small = architecture.parameters <= FITTED_UP_TO
    if not any(weight.role == "linear" for weight in linear):
        reason = "experts are rounded, whatever the effort"
    elif npu is not None:
        fits = effort == "best" or (effort == "balanced" and small)
        recipe = replace(recipe, quantize=FITTING if fits else AUTO)
        reason = f"effort {effort}, {'up to' if small else 'above'} a billion parameters"
    else:
        fits = effort == "best" or (effort == "balanced" and small and recipe.rotation_seed is not None)
        recipe = replace(recipe, quantize=FITTING if fits else WEIGHTED)
        reason = f"effort {effort}"
        if budget is None and effort != "fast" and (budget := _budget(recipe, architecture, whole_blocks)):
            reason = f"{reason}, in the size of llama.cpp's Q4_K_M"
    return _with_reason(recipe, architecture, reason, npu, adapters), budget


def rescaling_rule(recipe: Recipe, *, npu: NpuNumerics | None, adapters: bool) -> Rule | None:
    """By which rule factors of channels move between weights before these are quantized; see `rescaling.py`.

    An adapter was trained for inputs as they are published, a rotation has spread already what stands out, and an NPU's
    scales are a row's.
    """
    if recipe.decision is None or not needs_text(recipe.quantizer):
        return None
    if npu is not None or adapters or recipe.rotation_seed is not None:
        return None
    return "importance" if quantizer(recipe.quantizer).needs_importance else "size"


def _budget(recipe: Recipe, architecture: Architecture, whole_blocks: bool) -> Budget | None:
    """What Q4_K_M takes; None: a mix has no blocks of the size that is asked for, or even the smallest takes more."""
    if recipe.linear is None or recipe.linear.block_size not in MIXED_BLOCKS:
        return None
    budget = Budget(8 * llama_cpp_bytes(architecture) / architecture.parameters, None)
    try:
        plan_mix(architecture, recipe, budget, whole_blocks=whole_blocks)
    except UsageError:
        return None
    return budget


def _with_reason(
    recipe: Recipe, architecture: Architecture, reason: str, npu: NpuNumerics | None, adapters: bool
) -> Recipe:
    """The recipe with its decision: what its quantizer does to the model, and that experts are rounded where it leaves
    them."""
    chosen = quantizer(recipe.quantizer)
    title = chosen.title
    expert = next((weight for weight in architecture.weights.values() if weight.role == "expert"), None)
    if expert is not None and decided_by(recipe, expert, expert_format(recipe, architecture.spec)) != chosen.name:
        title = f"{title}, experts {quantizer(ROUNDING).title}"
    decided = replace(recipe, decision=Decision(title, reason))
    if rescaling_rule(decided, npu=npu, adapters=adapters):
        decided = replace(recipe, decision=Decision(f"{title}, channels rescaled", reason))
    return decided


def _repacked(linear: Sequence[Weight]) -> Decision:
    count = sum(1 for weight in linear if repackable_types(weight))
    if count == len(linear):
        return Decision("carried over", "the source holds every linear weight in 4-bit blocks of 32")
    return Decision(
        f"carried over, the rest {quantizer(ROUNDING).title}",
        f"the source holds {count} of {len(linear)} linear weights in 4-bit blocks of 32",
    )
