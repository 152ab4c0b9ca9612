"""Which keys of an architecture a GGUF file may have: all that are read, and those that change nothing."""

from __future__ import annotations

from collections.abc import Mapping

from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.config import shown

_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
}
# the embedding's shape states the first; the others describe the training or the file
_WITHOUT_EFFECT = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
_NEUTRAL: dict[str, object] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
}
"""Keys that change what the model computes, with the value that does not."""


def check_keys(metadata: Mapping[str, object], arch: str, where: str) -> None:
    """Refuse a model that states more about its computation than edgephi builds.

    Raises:
        UnsupportedModelError: naming the key and its value.
    """
    prefix = f"{arch}."
    for name, value in metadata.items():
        key = name.removeprefix(prefix)
        if key == name or key in _READ or key in _WITHOUT_EFFECT:
            continue
        if key in _NEUTRAL and isinstance(value, int | float | bool) and value == _NEUTRAL[key]:
            continue
        raise UnsupportedModelError(
            f"{name} is {shown(value)}, which edgephi does not build",
            where=where,
            remedy="Export from the model's safetensors folder, or use a GGUF file of a supported architecture",
        )
