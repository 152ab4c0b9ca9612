"""Mixed precision: every linear weight gets a format of its own; the bundle keeps to a budget and errs little."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from edgephi.errors import UsageError
from edgephi.export.calibrate.sensitivity import LADDER, Sensitivities
from edgephi.export.spec import Architecture, Weight
from edgephi.export.weights.layout import Allocator, Layout, place_matrix, plan_storage
from edgephi.export.weights.recipe import Recipe
from edgephi.export.weights.repack import repackable_types
from edgephi.quantize.allocate import StorageOption, allocate
from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.registry import FITTING


@dataclass(frozen=True)
class Budget:
    """What a bundle may take: exactly one of the two is given."""

    bits: float | None
    """Stored bits of all matrices over published parameters, as `Manifest.bits_per_weight` counts."""
    bytes: int | None
    """Of `model.onnx.data`."""


@dataclass(frozen=True)
class Mix:
    """A budget that can be met, before anything is measured."""

    budget: Budget
    weights: tuple[str, ...]
    """Linear weights whose format is open; what is repacked has its format, and so have experts."""
    smallest: Layout
    spare: int
    """Bytes the budget leaves on top of the smallest layout."""


def plan_mix(architecture: Architecture, recipe: Recipe, budget: Budget) -> Mix:
    """Find out which weights are open, and whether the budget can be met.

    Raises:
        UsageError: it cannot; names the smallest that can.
    """
    open_weights = {
        name: weight
        for name, weight in architecture.weights.items()
        if weight.role == "linear" and not (recipe.repacks and repackable_types(weight))
    }
    sizes = {name: [stored_bytes(weight, fmt, recipe) for fmt in LADDER] for name, weight in open_weights.items()}
    formats = {name: LADDER[each.index(min(each))] for name, each in sizes.items()}
    smallest = plan_storage(architecture, recipe, formats)
    spare = _limit(architecture, budget) - _used(smallest, budget)
    if spare < 0:
        raise _too_small(architecture, budget, smallest, repacked=len(open_weights) < _linear(architecture))
    return Mix(budget, tuple(open_weights), smallest, spare)


def choose_layout(architecture: Architecture, recipe: Recipe, mix: Mix, errors: Sensitivities) -> Layout:
    """The layout that keeps to the budget and errs least, by the errors that were measured."""
    choices = {
        name: [
            StorageOption(fmt, stored_bytes(architecture.weights[name], fmt, recipe), error)
            for fmt, error in zip(LADDER, errors[name], strict=True)
        ]
        for name in mix.weights
    }
    least = sum(min(choice.bytes for choice in each) for each in choices.values())
    limit, allowed = _limit(architecture, mix.budget), least + mix.spare
    while True:
        formats = {name: choice.format for name, choice in allocate(choices, allowed).items()}
        layout = plan_storage(architecture, recipe, formats)
        over = _used(layout, mix.budget) - limit
        if over <= 0 or allowed == least:
            return layout
        allowed = max(least, allowed - over)  # other sizes are padded otherwise


def stored_bytes(weight: Weight, fmt: BlockFormat, recipe: Recipe) -> int:
    """Codes, scales and zero points of a weight in a format."""
    return sum(tensor.bytes for tensor in place_matrix(Allocator(), weight.name, weight, fmt, recipe).tensors)


def describe_names(names: Iterable[str]) -> str:
    """`layers.0.qkv.weight`, `layers.1.qkv.weight`, `layers.5.o.weight` → "qkv 0-1; o 5"."""
    by_module: dict[str, list[int]] = {}
    for name in names:
        _, layer, module, _ = name.split(".")
        by_module.setdefault(module, []).append(int(layer))
    return "; ".join(f"{module} {_ranges(sorted(layers))}" for module, layers in by_module.items())


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _limit(architecture: Architecture, budget: Budget) -> int:
    if budget.bytes is not None:
        return budget.bytes
    assert budget.bits is not None
    return int(budget.bits * architecture.parameters / 8)


def _used(layout: Layout, budget: Budget) -> int:
    if budget.bytes is not None:
        return layout.bytes
    return sum(tensor.bytes for matrix in layout.matrices.values() for tensor in matrix.tensors)


def _linear(architecture: Architecture) -> int:
    return sum(1 for weight in architecture.weights.values() if weight.role == "linear")


def _too_small(architecture: Architecture, budget: Budget, smallest: Layout, *, repacked: bool) -> UsageError:
    used = _used(smallest, budget)
    otherwise = f", or --quantize {FITTING}, for weights that are carried over keep their size" if repacked else ""
    if budget.bytes is not None:
        least = f"{math.ceil(used / 1e5) / 10:.1f}MB"
        what = f"{budget.bytes:,} bytes are too few for this model, which takes {used:,} at least"
        return UsageError(what, remedy=f"Ask for --target-size {least} or more{otherwise}")
    bits = math.ceil(800 * used / architecture.parameters) / 100
    what = f"{budget.bits:g} bits a weight are too few for this model, which takes {bits:.2f} at least"
    return UsageError(what, remedy=f"Ask for --bits {bits:.2f} or more{otherwise}")
