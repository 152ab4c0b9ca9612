"""Mixed precision: every linear weight gets a format of its own; the bundle keeps to a budget and errs little."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from edgephi.errors import UsageError
from edgephi.export.calibrate.sensitivity import COARSE_EIGHT, LADDER, Sensitivities
from edgephi.export.spec import Architecture, DecoderSpec, Weight
from edgephi.export.weights.layout import Allocator, Layout, place_matrix, plan_storage
from edgephi.export.weights.recipe import Recipe
from edgephi.export.weights.repack import repackable_types
from edgephi.quantize.allocate import StorageOption, allocate
from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.registry import FITTING

MIXED_BLOCKS = tuple(sorted({fmt.block_size for fmt in LADDER}))
"""Block sizes a budget can begin with."""


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
    whole_blocks: bool = False
    """See `plan_mix`."""


def plan_mix(architecture: Architecture, recipe: Recipe, budget: Budget, *, whole_blocks: bool = False) -> Mix:
    """Find out which weights are open, and whether the budget can be met.

    Args:
        whole_blocks: some graph takes no block that is cut off at a row's end.

    Raises:
        UsageError: it cannot; names the smallest that can.
    """
    open_weights = {
        name: weight
        for name, weight in architecture.weights.items()
        if weight.role == "linear" and not (recipe.repacks and repackable_types(weight))
    }
    formats = {}
    for name, weight in open_weights.items():
        sizes = {fmt: stored_bytes(weight, fmt, recipe) for fmt in _formats(weight, recipe, whole_blocks)}
        formats[name] = min(sizes, key=sizes.__getitem__)
    smallest = plan_storage(architecture, recipe, formats)
    spare = _limit(architecture, budget) - _used(smallest, budget)
    if spare < 0:
        raise _too_small(architecture, budget, smallest, repacked=len(open_weights) < _linear(architecture))
    return Mix(budget, tuple(open_weights), smallest, spare, whole_blocks)


def choose_layout(architecture: Architecture, recipe: Recipe, mix: Mix, errors: Sensitivities) -> Layout:
    """The layout that keeps to the budget and errs least, by the errors that were measured."""
    choices = {
        name: [
            StorageOption(fmt, stored_bytes(architecture.weights[name], fmt, recipe), error)
            for fmt, error in zip(LADDER, errors[name], strict=True)
            if fmt in _formats(architecture.weights[name], recipe, mix.whole_blocks)
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


def _formats(weight: Weight, recipe: Recipe, whole_blocks: bool) -> tuple[BlockFormat, ...]:
    """The formats a weight can get, with blocks no smaller than the recipe's; where none has whole blocks, those in the
    recipe's size, which are refused with the graph."""
    assert recipe.linear is not None
    least = recipe.linear.block_size
    formats = tuple(
        fmt for fmt in LADDER if fmt.block_size >= least and (fmt != COARSE_EIGHT or least == fmt.block_size)
    )
    if not whole_blocks:
        return formats
    whole = tuple(fmt for fmt in formats if not weight.shape[1] % fmt.block_size)
    return whole or tuple(fmt for fmt in formats if fmt.block_size == least)


def stored_bytes(weight: Weight, fmt: BlockFormat, recipe: Recipe) -> int:
    """Codes, scales and zero points of a weight in a format."""
    return sum(tensor.bytes for tensor in place_matrix(Allocator(), weight.name, weight, fmt, recipe).tensors)


LLAMA_CPP_BITS = {"Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5}
"""Stored bits a weight of GGUF's types."""
LLAMA_CPP_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp takes where rows are no whole blocks of 256."""


def llama_cpp_bytes(architecture: Architecture) -> int:
    """Bytes of all matrices in llama.cpp's Q4_K_M, by the rules of its llama-quant.cpp.

    Q6_K for the head (or the embedding that serves as one), and for v and down in half of the layers; Q5_K for q, k and
    v where they are one matrix; Q4_K for the rest.
    """
    total = 0.0
    for name, weight in architecture.weights.items():
        if weight.role == "vector":
            continue
        rows, columns = weight.shape
        for kind, share in _llama_cpp_types(architecture.spec, name):
            stored = kind if columns % 256 == 0 else LLAMA_CPP_FALLBACK[kind]
            total += share * rows * columns * LLAMA_CPP_BITS[stored] / 8
    return int(total)


def _llama_cpp_types(spec: DecoderSpec, name: str) -> list[tuple[str, float]]:
    """Types of a matrix, each with its share of the rows."""
    if not name.startswith("layers."):
        tied_or_head = name.startswith("head") or (name.startswith("embed") and spec.tied_embedding)
        return [("Q6_K" if tied_or_head else "Q4_K", 1.0)]
    _, layer, module = name.removesuffix(".weight").split(".", 2)
    number, eighth = int(layer), spec.layers // 8
    more = number < eighth or number >= 7 * spec.layers // 8 or (number - eighth) % 3 == 2
    if module == "qkv" and spec.family.startswith("phi3"):
        return [("Q5_K", 1.0)]
    if module == "qkv":
        values = spec.kv_size / (spec.query_size + 2 * spec.kv_size)
        return [("Q4_K", 1 - values), ("Q6_K" if more else "Q4_K", values)]
    return [("Q6_K" if more and module.endswith("down") else "Q4_K", 1.0)]


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
