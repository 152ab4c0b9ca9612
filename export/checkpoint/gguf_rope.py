"""What a GGUF file says of rotary embeddings, in the words of config.json.

GGUF keeps factors as tensors without a layer number. Sources: ggml-org/llama.cpp, gguf-py/gguf/constants.py for the
names, the converter's Phi3MiniModel and LlamaModel for what is written, src/llama-model.cpp for what is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.config import Config

SHORT, LONG, FREQS = "rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"
FACTOR_TENSORS = (SHORT, LONG, FREQS)
"""Divisors of the angles, one for each pair of rotated channels."""

ORIGINAL_CONTEXT = "phi3.rope.scaling.original_context_length"
PHI3_FIRST_CONTEXT = 4096
"""Original context of the first Phi-3, for files older than the key."""


def rope_words(
    metadata: Mapping[str, object], arch: str, rope_dim: int, factors: Mapping[str, Sequence[float]], where: str
) -> dict[str, object]:
    """`rope_theta`, and as far as the file needs them `rope_scaling` and `original_max_position_embeddings`.

    Args:
        metadata: GGUF keys → Python values.
        arch: `general.architecture`.
        rope_dim: rotated channels of a head.
        factors: the values of those `FACTOR_TENSORS` that the file has; an empty one counts as absent.
        where: the file's name, for errors.

    Raises:
        UnsupportedModelError: YaRN, factors that do not fit, or a long context whose factors the file lost.
    """
    factors = {name: values for name, values in factors.items() if len(values)}
    keys = Config(metadata, where)
    _check_factors(factors, arch, rope_dim, where)
    if arch == "phi3":
        _check_context(keys, bool(factors))
    # the older key means the same; a factor without a type stretches linearly
    scaling = f"{arch}.rope.scaling"
    stretch = _positive(keys, f"{scaling}.factor") or _positive(keys, f"{arch}.rope.scale_linear") or 1.0
    kinds = ("none", "linear", "longrope") if SHORT in factors else ("none", "linear")
    stretched = keys.one_of(f"{scaling}.type", kinds, "linear") != "none" and stretch != 1.0
    attention = _positive(keys, f"{scaling}.attn_factor") or 1.0
    if factors and stretched:
        raise keys.refusal(f"{scaling}.factor", stretch, "the file carries rope factors besides")
    if SHORT not in factors and attention != 1.0:
        raise keys.refusal(f"{scaling}.attn_factor", attention, f"the file has no {SHORT}")
    words: dict[str, object] = {"rope_theta": _positive(keys, f"{arch}.rope.freq_base") or 10000.0}
    if SHORT in factors:
        words |= _longrope(keys, factors)
    elif FREQS in factors:
        words["rope_scaling"] = {"rope_type": "factors", "factors": [float(x) for x in factors[FREQS]]}
    elif stretched:
        words["rope_scaling"] = {"rope_type": "linear", "factor": stretch}
    return words


def _check_factors(factors: Mapping[str, Sequence[float]], arch: str, rope_dim: int, where: str) -> None:
    for name, values in factors.items():
        if len(values) != rope_dim // 2 or not all(math.isfinite(x) and x > 0 for x in values):
            raise UnsupportedModelError(
                f"{name} is no list of {rope_dim // 2} positive numbers, one for each pair of rotated channels",
                where=where,
                remedy="Convert the model to GGUF again with a recent llama.cpp",
            )
    allowed = {"llama": {FREQS}, "phi3": {SHORT, LONG}}.get(arch, set())
    if set(factors) not in (set(), allowed):
        raise UnsupportedModelError(
            f"a {arch} file with {', '.join(sorted(factors))}: {', '.join(sorted(allowed)) or 'none'} expected",
            where=where,
            remedy="Use a GGUF file of a supported architecture, converted with a recent llama.cpp",
        )


def _check_context(keys: Config, has_factors: bool) -> None:
    # a file from before llama.cpp knew the factors (May 2024) would export, and rotate every position wrongly
    context = keys.integer("phi3.context_length")
    if not has_factors and keys.integer(ORIGINAL_CONTEXT, PHI3_FIRST_CONTEXT) < context:
        raise keys.refusal("phi3.context_length", context, f"{SHORT} and {LONG} are missing from the file")


def _longrope(keys: Config, factors: Mapping[str, Sequence[float]]) -> dict[str, object]:
    section: dict[str, object] = {
        "type": "longrope",
        "short_factor": [float(x) for x in factors[SHORT]],
        "long_factor": [float(x) for x in factors[LONG]],
    }
    # without it the factor follows from the two context lengths
    attention = _positive(keys, "phi3.rope.scaling.attn_factor")
    if attention is not None:
        section["attention_factor"] = attention
    return {"rope_scaling": section, "original_max_position_embeddings": keys.integer(ORIGINAL_CONTEXT)}


def _positive(keys: Config, key: str) -> float | None:
    """A number above 0; None where the key is absent or 0, which llama.cpp takes for absent."""
    return keys.positive(key) if keys.values.get(key) not in (None, 0) else None
