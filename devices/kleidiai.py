"""Whether onnxruntime may compute a bundle with KleidiAI, Arm's library of matrix kernels.

Matrices of 4-bit blocks without zero points go to KleidiAI at accuracy level 4 (MatMulNBits; blocks of 32 or more). It
rounds a row of activations to 8 bits with one scale, where onnxruntime's own kernels have a scale for each block.
SmolLM2-135M from a Q4_0 file, KL divergence from the float model: 0.0257 with it, 0.0041 without. Matrices with zero
points never go there. So it is switched off for the bundles it would round, unless a profile wants it.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

from edgephi.bundle import RecipeRecord
from edgephi.devices.detect import architecture

KleidiaiUse = Literal["exact", "any"]
"""exact: not where it rounds a whole row with one scale. any: as onnxruntime chooses."""
_LEVEL, _BITS, _SMALLEST_BLOCK = 4, 4, 32


@dataclass(frozen=True)
class Kleidiai:
    """Whether KleidiAI may be used on an Arm processor."""

    on: bool
    because: str


def kleidiai(recipe: RecipeRecord, asked: KleidiaiUse = "exact", who: str = "default") -> Kleidiai | None:
    """Decide for a bundle on this machine's CPU; None where the processor is no Arm and there is nothing to decide.

    Args:
        who: asked, for the record.
    """
    if architecture(platform.machine()) != "arm64":
        return None
    if not rounds_rows(recipe):
        return Kleidiai(True, "no 4-bit weights without zero points at accuracy level 4, so it rounds nothing here")
    if asked == "any":
        return Kleidiai(True, who)
    return Kleidiai(False, "it would round activations by the row for this bundle's 4-bit weights without zero points")


def rounds_rows(recipe: RecipeRecord) -> bool:
    """Whether a bundle has matrices that KleidiAI would take."""
    return recipe.accuracy_level == _LEVEL and any(
        group.bits == _BITS and group.symmetric and (group.block_size or 0) >= _SMALLEST_BLOCK
        for group in recipe.weights
    )
