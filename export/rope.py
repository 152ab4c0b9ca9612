"""Rotary position embeddings as configurations describe them, and the tables a graph looks them up in."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgephi.export.config import Config
from edgephi.export.spec import Rope

TYPES = ("default", "linear", "llama3", "factors")
"""The last is no published name: GGUF files state llama3's result, one divisor for each angle."""


def rope_from_config(config: Config, head_dim: int) -> Rope:
    """Read a rope from config.json of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Raises:
        UnsupportedModelError: an unknown rope type, naming it.
    """
    scaling = scaling_section(config)
    inv_freq: NDArray[np.float32] = np.float32(1.0) / powers_of_theta(config, head_dim)
    if scaling is not None:
        kind = scaling.one_of(type_key(scaling), TYPES, "default")
        if kind == "linear":
            inv_freq = inv_freq / np.float32(scaling.number("factor"))
        elif kind == "llama3":
            inv_freq = _llama3(inv_freq, scaling)
        elif kind == "factors":
            divisors = np.asarray(scaling.numbers("factors", len(inv_freq)), np.float32)
            inv_freq = np.divide(inv_freq, divisors, dtype=np.float32)
    return make_rope(inv_freq)


def scaling_section(config: Config) -> Config | None:
    """Where transformers 5, or else 4, describes how the angles are scaled."""
    return config.section("rope_parameters") or config.section("rope_scaling")


def type_key(scaling: Config) -> str:
    """transformers 4 wrote "type" before "rope_type"."""
    return "rope_type" if scaling.has("rope_type") or not scaling.has("type") else "type"


def powers_of_theta(config: Config, head_dim: int) -> NDArray[np.float32]:
    """theta^(2i/dim), the reciprocals of the unscaled angles per position; float32 [dim / 2]."""
    section = config.section("rope_parameters")
    theta = (section if section and section.has("rope_theta") else config).number("rope_theta", 10000.0)
    fraction = (section if section and section.has("partial_rotary_factor") else config).number(
        "partial_rotary_factor", 1.0
    )
    dim = int(head_dim * fraction)
    if dim % 2 or not 0 < dim <= head_dim:
        raise config.refusal("partial_rotary_factor", fraction, f"it rotates {dim} of {head_dim} channels")
    # float32 throughout: models were trained with the angles this rounding gives
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.asarray(np.power(np.float32(theta), exponents), dtype=np.float32)


def make_rope(inv_freq: NDArray[np.float32], scale: float = 1.0) -> Rope:
    """A rope of these angles per position, radians [dim / 2]."""
    return Rope(dim=2 * len(inv_freq), inv_freq=tuple(float(x) for x in inv_freq), scale=scale)


def _llama3(inv_freq: NDArray[np.float32], scaling: Config) -> NDArray[np.float32]:
    """Slow channels are stretched by `factor`, fast ones kept, those between are blended (Llama 3.1 release notes)."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    context = scaling.integer("original_max_position_embeddings")
    if high <= low:
        raise scaling.refusal("high_freq_factor", high, f"it must exceed low_freq_factor {low}")
    turns = context * inv_freq / np.float32(2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return np.array((1 - blend) * inv_freq / np.float32(factor) + blend * inv_freq, dtype=np.float32)


def rope_table(rope: Rope, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of positions start … stop - 1, each float32 [stop - start, dim / 2 + still_pairs]."""
    positions = np.arange(start, stop, dtype=np.float32)
    angles = np.outer(positions, np.asarray(rope.inv_freq, dtype=np.float32)).astype(np.float32)
    scale = np.float32(rope.scale)
    still = ((0, 0), (0, rope.still_pairs))
    return np.pad(np.cos(angles) * scale, still, constant_values=1), np.pad(np.sin(angles) * scale, still)
