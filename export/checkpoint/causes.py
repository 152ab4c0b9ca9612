"""Why a checkpoint does not have the tensors its configuration asks for, and what to do about that cause.

Public reports name a handful of ways in which weights come to lie in a folder half saved, wrapped or as something
else; each leaves its mark in the names and shapes of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MERGE = "Merge the adapter into its base model (peft: `model.merge_and_unload()`), save the result and name its folder"
_WRAPPERS = (
    ("base_model.model.", "inside peft's wrapper", MERGE),
    (
        "_orig_mod.",
        "inside torch.compile's wrapper",
        "Save the model it wraps (`model._orig_mod.save_pretrained(...)`), or take the prefix off the names",
    ),
    (
        "module.",
        "inside the wrapper of a distributed training",
        "Save the model it wraps (`model.module.save_pretrained(...)`), or take the prefix off the names",
    ),
    (
        "_fsdp_wrapped_module.",
        "inside FSDP's wrapper",
        "Gather the weights with FSDP's full state dict, and save them with `save_pretrained`",
    ),
    (
        "language_model.",
        "as the decoder of a model for pictures or sound",
        "Use the checkpoint of the text model, or save the decoder alone",
    ),
    (
        "model.model.",
        "inside a module of another program",
        "Save the model it wraps with `save_pretrained`, or take the prefix off the names",
    ),
    ("pretrained_model.", "inside trl's wrapper with a value head", "Save the model it wraps, without the value head"),
)
_ADAPTER = re.compile(r"(^|\.)lora_|\.lora_[ab]$|\.base_layer\.|modules_to_save|\.ia3_|lora_magnitude|oft_|hada_w")
_CLASSIFIER = re.compile(
    r"(^|\.)(score|classifier|classification_head|qa_outputs|v_head|reward_head|regression_head)\."
)
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_scale|weight_scale_inv|weight_zero_point|weight_packed|weight_shape"
    r"|input_scale|absmax|quant_map|nested_absmax|SCB|scale_inv)$|\.weight\.(absmax|quant_|nested_|bitsandbytes)"
)

_MARKS = (
    (_ADAPTER, "an adapter (LoRA) lies beside the weights or in their place", MERGE),
    (_QUANTIZED, "the weights are quantized", "Use the checkpoint it was made from, or a GGUF file of the model"),
    (
        _CLASSIFIER,
        "this head classifies or rates texts",
        "Use a checkpoint with a language model's head (…ForCausalLM)",
    ),
)


def cause_of(names: Iterable[str]) -> tuple[str, str] | None:
    """What tensors without a place in the model say about the checkpoint, and the remedy; None: nothing known.

    Args:
        names: of tensors nobody claims, or of all tensors where one is missing.
    """
    names = list(names)
    for prefix, how, remedy in _WRAPPERS:
        if any(name.startswith(prefix) for name in names):
            return f"the names begin with {prefix}, as saved {how}", remedy
    for pattern, what, remedy in _MARKS:
        if any(pattern.search(name) for name in names):
            return what, remedy
    return None


ZERO3 = (
    "Gather the weights before they are saved (DeepSpeed's zero_to_fp32.py, or "
    "`stage3_gather_16bit_weights_on_model_save`)"
)
