"""Rotary position embeddings as configurations describe them, and the tables a graph looks them up in."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgephi.export.checkpoint.config import Config, shown
from edgephi.export.families.nearest import cos_and_sin, power
from edgephi.export.spec import Rope

TYPES = ("default", "linear", "llama3", "factors")
"""The last is no published name: GGUF files state llama3's result, one divisor for each angle."""

_KEYS_OF = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "factors": {"factors"},
    "longrope": {"attention_factor", "factor", "long_factor", "long_mscale", "short_factor", "short_mscale"},
}
_KEYS_OF["su"] = _KEYS_OF["longrope"]
ORIGINAL = "original_max_position_embeddings"
DEFAULTS = {("phi", "partial_rotary_factor"): 0.5, ("phimoe", "rope_theta"): 1000000.0}
"""What PhiConfig and PhimoeConfig take where nothing is said; every other class takes 1.0 and 10,000."""
_ANY_TYPE = {
    "finetuned",
    ORIGINAL,
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "type",
}


def rope_from_config(config: Config, head_dim: int) -> Rope:
    """Read a rope from config.json of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Raises:
        UnsupportedModelError: an unknown rope type, naming it; or two places of the file that contradict each other.
    """
    scaling = scaling_section(config)
    inv_freq: NDArray[np.float32] = np.float32(1.0) / powers_of_theta(config, head_dim)
    if scaling is not None:
        kind = scaling.one_of(type_key(scaling), TYPES, "default")
        if kind == "linear":
            inv_freq = inv_freq / np.float32(scaling.positive("factor"))
        elif kind == "llama3":
            inv_freq = _llama3(inv_freq, scaling, stated_once(config, ORIGINAL).integer(ORIGINAL))
        elif kind == "factors":
            divisors = np.asarray(scaling.numbers("factors", len(inv_freq)), np.float32)
            inv_freq = np.divide(inv_freq, divisors, dtype=np.float32)
    return checked_rope(config, inv_freq)


def scaling_section(config: Config) -> Config | None:
    """Where transformers 4 or 5 describes how the angles are scaled; None where that is left out or empty.

    Raises:
        UnsupportedModelError: both places describe it, and not alike; or a key that the type does not have.
    """
    new, old = _section(config, "rope_parameters"), _section(config, "rope_scaling")
    if new is not None and old is not None and _plain(config, new) != _plain(config, old):
        raise config.refusal("rope_scaling", dict(old.values), f"rope_parameters is {shown(dict(new.values))}")
    section = new or old
    if section is not None:
        kind = section.text(type_key(section), "default")
        for key, value in section.values.items():
            neutral = key in ("factor", "attention_factor") and value == 1
            if value is not None and key not in _ANY_TYPE | _KEYS_OF.get(kind, {key}) and not neutral:
                raise section.refusal(key, value, f"the rope type {kind} has no such key")
    return section


def _section(config: Config, key: str) -> Config | None:
    section = config.section(key)
    return section if section is not None and section.values else None


def _plain(config: Config, section: Config) -> dict[str, object]:
    """What a section says, its type by one name, together with what the file says of it elsewhere."""
    said = {key: value for key, value in section.values.items() if value is not None}
    said["rope_type"] = section.text(type_key(section), "default")
    said.pop("type", None)
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        default = DEFAULTS.get((str(config.values.get("model_type")), key), default)
        said.setdefault(key, config.values[key] if config.has(key) else default)
    return said


def type_key(scaling: Config) -> str:
    """transformers 4 wrote "type" before "rope_type"; both may stand there, if they agree."""
    if scaling.has("rope_type") and scaling.has("type"):
        types = {"longrope" if scaling.text(key) == "su" else scaling.text(key) for key in ("rope_type", "type")}
        if len(types) > 1:
            raise scaling.refusal("type", scaling.values["type"], f"rope_type is {shown(scaling.values['rope_type'])}")
    return "rope_type" if scaling.has("rope_type") or not scaling.has("type") else "type"


def powers_of_theta(config: Config, head_dim: int) -> NDArray[np.float32]:
    """theta^(2i/dim), the reciprocals of the unscaled angles per position; float32 [dim / 2]."""
    theta = stated_once(config, "rope_theta").positive("rope_theta", 10000.0)
    owner = stated_once(config, "partial_rotary_factor")
    fraction = owner.positive("partial_rotary_factor", 1.0)
    dim = int(head_dim * min(fraction, 2.0))
    if dim % 2 or not 0 < dim <= head_dim:
        raise owner.refusal("partial_rotary_factor", fraction, f"it rotates {dim} of {head_dim} channels")
    # float32 throughout: models were trained with the angles this rounding gives
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return power(np.float32(theta), exponents)


def stated_once(config: Config, key: str) -> Config:
    """Where a key of the rope stands: in the rope's section, as transformers 5 has it, or at the top level.

    transformers 4 and 5 do not read the same one of the two, so both may say it only if they say the same.
    """
    section = scaling_section(config)
    if section is None or not section.has(key):
        return config
    if config.has(key) and config.values[key] != section.values[key]:
        raise config.refusal(key, config.values[key], f"in {section.where} it is {shown(section.values[key])}")
    return section


def make_rope(inv_freq: NDArray[np.float32], scale: float = 1.0) -> Rope:
    """A rope of these angles per position, radians [dim / 2]."""
    return Rope(dim=2 * len(inv_freq), inv_freq=tuple(float(x) for x in inv_freq), scale=scale)


def checked_rope(config: Config, inv_freq: NDArray[np.float32], scale: float = 1.0) -> Rope:
    """The same for angles that follow from a configuration.

    Raises:
        UnsupportedModelError: an angle that float32 does not hold, which numbers that are each possible can lead to.
    """
    if not np.all((inv_freq > 0) & np.isfinite(inv_freq)):
        key = "rope_parameters" if config.has("rope_parameters") else "rope_scaling"
        key = key if config.has(key) else "rope_theta"
        raise config.refusal(key, config.values.get(key), "its angles are no positive numbers in float32")
    return make_rope(inv_freq, scale)


def _llama3(inv_freq: NDArray[np.float32], scaling: Config, context: int) -> NDArray[np.float32]:
    """Slow channels are stretched by `factor`, fast ones kept, those between are blended (Llama 3.1 release notes).

    Args:
        context: tokens of the sequences that the model was first trained with.
    """
    factor = scaling.positive("factor")
    low, high = scaling.positive("low_freq_factor"), scaling.positive("high_freq_factor")
    if high <= low:
        raise scaling.refusal("high_freq_factor", high, f"it must exceed low_freq_factor {low}")
    turns = context * inv_freq / np.float32(2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return np.array((1 - blend) * inv_freq / np.float32(factor) + blend * inv_freq, dtype=np.float32)


def rope_table(rope: Rope, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of positions start … stop - 1, each float32 [stop - start, dim / 2 + still_pairs].

    An angle is rounded to float32, and so are its cosine and sine before they are scaled.
    """
    positions = np.arange(start, stop, dtype=np.float32)
    angles = np.outer(positions, np.asarray(rope.inv_freq, dtype=np.float32)).astype(np.float32)
    scale = np.float32(rope.scale)
    still = ((0, 0), (0, rope.still_pairs))
    cos, sin = cos_and_sin(angles)
    return np.pad(cos * scale, still, constant_values=1), np.pad(sin * scale, still)
