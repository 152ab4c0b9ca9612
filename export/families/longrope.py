"""LongRoPE as configurations describe it: short factors, long factors, and the length at which a model changes over.

A sequence of up to `original_max_position_embeddings` tokens is rotated with the short factors, a longer one with the
long factors, at *every* position: a key that was cached on one side is wrong on the other.
Source: Ding et al. 2024, "LongRoPE"; transformers, modeling_rope_utils.py, for the keys and the attention factor.
"""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np

from edgephi.export.checkpoint.config import Config
from edgephi.export.families.nearest import DIGITS
from edgephi.export.families.rope import checked_rope, powers_of_theta, rope_from_config, scaling_section, type_key
from edgephi.export.spec import LongRope, Rope

TYPES = ("longrope", "su")
"""The second is how Phi-3 was first published."""


def ropes_from_config(
    config: Config, head_dim: int, context: int, *, reads_mscale: bool = True
) -> tuple[Rope, LongRope | None]:
    """The rope, and the one that replaces it in long sequences where the model has two.

    Reads what `rope_from_config` reads, and in addition the types "longrope" and "su": `short_factor` and `long_factor`
    (a number for each pair of rotated channels), `attention_factor`, or `short_mscale` and `long_mscale` (Phi-3.5-MoE).
    For two places that give different original lengths the caller has to decide; the top level counts here.

    Args:
        context: longest sequence the model is for, in tokens. Up to the original length, the short factors do.
        reads_mscale: False for Phi3ForCausalLM, which transformers 4 and 5 scale by the attention factor whatever
            `short_mscale` and `long_mscale` say.

    Raises:
        UnsupportedModelError: a key is missing or holds a value that cannot be; the message names it.
    """
    scaling = scaling_section(config)
    if scaling is None or not scaling.has(type_key(scaling)) or scaling.text(type_key(scaling)) not in TYPES:
        return rope_from_config(config, head_dim), None
    # as in transformers: Phi-3 has the key at the top level, and there it outranks the section's
    owner = config if config.has("original_max_position_embeddings") else scaling
    original = owner.integer("original_max_position_embeddings")
    scale = _attention_factor(scaling, context, original)
    wavelengths = powers_of_theta(config, head_dim)

    def rope(factors: str, mscale: str) -> Rope:
        numbers = np.asarray(scaling.numbers(factors, len(wavelengths)), np.float32)
        if not numbers.min() > 0:
            raise scaling.refusal(factors, float(numbers.min()), "factors above 0 are needed")
        own = scaling.positive(mscale, scale) if reads_mscale else scale
        return checked_rope(config, np.float32(1.0) / (numbers * wavelengths), own)

    short, long = rope("short_factor", "short_mscale"), rope("long_factor", "long_mscale")
    return short, LongRope(original, long) if context > original else None


def _attention_factor(scaling: Config, context: int, original: int) -> float:
    """What cos and sin are multiplied by; unless it is given, sqrt(1 + ln(stretch) / ln(original length))."""
    if scaling.has("attention_factor"):
        return scaling.positive("attention_factor")
    stretch = scaling.positive("factor", context / original)
    if not math.isclose(stretch, context / original, rel_tol=1e-4):
        # transformers 5 takes the factor, transformers 4 the ratio
        raise scaling.refusal("factor", stretch, f"the two context lengths are {context / original:g} apart")
    if stretch <= 1:
        return 1.0
    if original < 2:
        raise scaling.refusal("original_max_position_embeddings", original, "at least 2 is needed")
    # with the digits of decimal arithmetic: two libraries' logarithms can differ in the last bit
    ratio = DIGITS.divide(DIGITS.ln(Decimal(stretch)), DIGITS.ln(Decimal(original)))
    return float(DIGITS.sqrt(DIGITS.add(ratio, 1)))
