"""The text decoder of Phi-4-multimodal (Phi4MMForCausalLM): Phi-4-mini's, in a checkpoint that holds much more.

For text alone the published code takes all adapters off, and what remains is a Phi3ForCausalLM. Its linear layers are
named `….base_layer.weight`, because adapters were wrapped around them. Left out, as parts that text never meets:
the picture and speech encoders with their projections (`model.embed_tokens_extend.*`), and the LoRA adapters for
pictures and speech in the decoder (`….lora_A.vision.weight`, `….lora_B.speech.weight` and so on).
Source: Abouelenin et al. 2025, "Phi-4-Mini Technical Report"; microsoft/Phi-4-multimodal-instruct for the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from edgephi.export.families import phi3
from edgephi.export.families.naming import Blueprint
from edgephi.export.spec import Architecture, Checkpoint, TensorRef

_LEFT_OUT = re.compile(
    r"model\.embed_tokens_extend\..+"
    r"|model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)\.lora_[AB]\.(vision|speech)\.weight"
)


def describe(checkpoint: Checkpoint) -> Architecture:
    """Read the configuration and claim the text decoder's tensors of a Phi4MMForCausalLM."""
    architecture = phi3.describe(replace(checkpoint, tensors=_text_tensors(checkpoint.tensors)))
    # the decoder alone: onnxruntime-genai's own type for this model expects the encoders too
    return replace(architecture, spec=replace(architecture.spec, family="phi4mm"))


def _text_tensors(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The decoder's tensors by the names Phi-3 gives them."""
    if isinstance(tensors, Blueprint):
        return tensors
    renamed = {name: name.replace(".base_layer.", ".") for name in tensors if not _LEFT_OUT.fullmatch(name)}
    # a weight under both names keeps both, and is refused as a tensor without a use
    return {name if ours in tensors else ours: tensors[name] for name, ours in renamed.items()}
