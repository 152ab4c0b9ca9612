"""How weights are to be stored: the recipe, and which format and whose codes each weight gets under it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from edgephi.errors import UsageError
from edgephi.export.spec import HEAD, Architecture, DecoderSpec, Weight
from edgephi.export.weights.repack import REPACKED, repackable_types
from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.lpbq import LpbqFormat
from edgephi.quantize.quantizer import Format
from edgephi.quantize.registry import AUTO, ROUNDING, needs_text, quantizer

Precision = Literal["int4", "int8", "fp16", "fp32"]

EMBEDDING_BLOCK = 32
"""Embedding and head are 8-bit in blocks of 32: 1.125 bytes a value, an error far below that of the 4-bit linears."""


@dataclass(frozen=True)
class Decision:
    """What becomes of int4 weights, and why, in the manifest's words."""

    picked: str
    reason: str


@dataclass(frozen=True)
class Recipe:
    """How weights are stored. `linear` and `embedding` None: unquantized, in `float_type`."""

    precision: Precision
    linear: BlockFormat | None
    embedding: BlockFormat | None
    float_type: Literal["float32", "float16"]
    """Activations, norms, KV cache; unquantized weights too."""
    accuracy_level: int = 4
    """MatMulNBits: 4 multiplies in int8, 1 in float32."""
    quantize: str = ROUNDING
    """Who decides the codes of int4 weights, a word of `quantize/registry.py`: as `asked`, or what `export/plan.py`
    made of auto; that stays auto where blocks of the source are repacked, or rounding is quick and fitting is not."""
    asked: str = ROUNDING
    decision: Decision | None = None
    """None: nothing has 4 bits, or nothing is decided yet; see `export/plan.py`."""
    rotation_seed: int | None = None
    """Of the rotation that `export/weights/rotation.py` folds into the weights; None: they are as published."""
    head: BlockFormat | None = None
    """None: as the embedding. Else the head is stored by itself, also where a checkpoint's embedding serves as one."""
    half_scales: bool = True
    """Scales of blocks in float16 whatever the graph computes in, cast while a model loads: at blocks of 32 half a bit
    less a weight. Nothing is lost: SmolLM2-135M, rounded, 4,088 predictions: 104.1 to 95.7 MB, KL divergence to float
    0.26 and 0.26; int8 155.9 to 148.3 MB, 0.0043 and 0.0042; loading takes 0.22 s instead of 0.20."""

    @property
    def repacks(self) -> bool:
        """Whether 4-bit blocks of the source stay what they are."""
        if self.linear is None or self.quantize != AUTO:
            return False
        return (self.linear.bits, self.linear.block_size) == (REPACKED.bits, REPACKED.block_size)

    @property
    def quantizer(self) -> str:
        """The name of the quantizer for weights that are not repacked."""
        return ROUNDING if self.quantize == AUTO else self.quantize


def make_recipe(
    precision: Precision,
    block_size: int,
    accuracy_level: int = 4,
    quantize: str = ROUNDING,
    rotation_seed: int | None = None,
    head_bits: int = 8,
) -> Recipe:
    """The recipe a precision stands for; `export/options.py` refuses what does not exist."""
    eight = BlockFormat(bits=8, block_size=EMBEDDING_BLOCK, symmetric=True)
    match precision:
        case "int4":
            linear = BlockFormat(bits=4, block_size=block_size, symmetric=False)
            return Recipe(
                precision,
                linear,
                eight,
                "float32",
                accuracy_level,
                quantize,
                quantize,
                rotation_seed=rotation_seed,
                head=linear if head_bits == 4 else None,
            )
        case "int8":
            linear = BlockFormat(bits=8, block_size=block_size, symmetric=True)
            return Recipe(precision, linear, eight, "float32", accuracy_level, rotation_seed=rotation_seed)
        case "fp16":
            return Recipe(precision, None, None, "float16", accuracy_level, rotation_seed=rotation_seed)
        case "fp32":
            return Recipe(precision, None, None, "float32", accuracy_level, rotation_seed=rotation_seed)


def require_written(name: str, fmt: BlockFormat | LpbqFormat) -> None:
    """Raises UsageError when a quantizer cannot write the format of 4-bit linear weights."""
    chosen = quantizer(name)
    if not chosen.writes(fmt):
        scales = "scales of two levels" if isinstance(fmt, LpbqFormat) else "a scale and a zero point each"
        raise UsageError(
            f"the quantizer {name} does not write 4-bit blocks of {fmt.block_size} with {scales}",
            remedy="Choose another --quantize or --block-size; on an NPU, --npu-numerics float16",
        )


def decided_by(recipe: Recipe, weight: Weight, fmt: Format | None) -> str:
    """The name of the quantizer that decides the codes of a weight in this format.

    The recipe's quantizer decides linear weights and the head where they have 4 bits, in formats that it writes. What
    has 8 bits is rounded, which is good enough; so are experts where the quantizer needs a text, for each is reached by
    few tokens.
    """
    chosen = quantizer(recipe.quantizer)
    four_bits = isinstance(fmt, LpbqFormat) or (isinstance(fmt, BlockFormat) and fmt.bits == 4)
    meant = weight.role == "linear" or weight.name == HEAD or (weight.role == "expert" and not needs_text(chosen.name))
    return chosen.name if fmt is not None and four_bits and meant and chosen.writes(fmt) else ROUNDING


def repacks_any(recipe: Recipe, architecture: Architecture) -> bool:
    """Whether some weight stays in the source's own blocks."""
    return recipe.repacks and any(map(repackable_types, architecture.weights.values()))


def block_format(recipe: Recipe, weight: Weight) -> BlockFormat | None:
    """The format of this weight under the recipe; embedding blocks shrink until they divide the row."""
    if weight.role == "linear":
        return recipe.linear
    if weight.name == HEAD and recipe.head is not None:
        return recipe.head
    if recipe.embedding is None:
        return None
    # GatherBlockQuantized takes whole blocks only; 16 is its smallest
    if weight.shape[1] % recipe.embedding.block_size == 0:
        return recipe.embedding
    if weight.shape[1] % 16 == 0:
        return BlockFormat(recipe.embedding.bits, 16, recipe.embedding.symmetric)
    raise UsageError(
        f"{weight.name} has rows of {weight.shape[1]} values, no multiple of 16",
        remedy="Export with --precision fp16 or fp32",
    )


def expert_format(recipe: Recipe, spec: DecoderSpec) -> BlockFormat | None:
    """The recipe's format in blocks that QMoE takes: one size for all, whole blocks only, two or more to a row."""
    if recipe.linear is None:
        return None
    size = recipe.linear.block_size
    while size >= 16:
        if all(columns % size == 0 and columns > size for columns in (spec.hidden_size, spec.intermediate_size)):
            return replace(recipe.linear, block_size=size)
        size //= 2
    raise UsageError(
        f"experts of {spec.hidden_size} and {spec.intermediate_size} channels cannot be cut into blocks of 16 or more",
        remedy="Export with --precision fp16 or fp32",
    )
