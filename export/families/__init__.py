"""One file per model family: a published configuration and its tensors become a DecoderSpec and canonical weights."""

from __future__ import annotations

from collections.abc import Mapping

from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.config import Config, shown
from edgephi.export.families import llama, phi, phi3, phi3small, phi4mm, phimoe
from edgephi.export.families.config_keys import check_keys
from edgephi.export.families.naming import Blueprint
from edgephi.export.spec import Architecture, Checkpoint, DecoderSpec

_FAMILIES = {
    "llama": (llama.read_config, llama.describe),
    "phi": (phi.read_config, phi.describe),
    "phi3": (phi3.read_config, phi3.describe),
    "phi3small": (phi3small.read_config, phi3small.describe),
    "phi4mm": (phi3.read_config, phi4mm.describe),
    "phimoe": (phimoe.read_config, phimoe.describe),
}

_OLD_PHI = (
    "phi-1, phi-1.5 or phi-2 as first published, with other tensors than PhiForCausalLM",
    "Download the model's current revision, whose model_type is 'phi'",
)
# relatives people will try: what they are, and what to do instead
_REFUSED = {
    "phi4flash": (
        "Phi-4-mini-flash-reasoning, which mixes state-space layers and differential attention",
        "Use microsoft/Phi-4-mini-reasoning",
    ),
    "phi3_v": (
        "Phi-3-vision or Phi-3.5-vision, a picture encoder and a decoder trained with it",
        "Use microsoft/Phi-3.5-mini-instruct for text",
    ),
    "phi-msft": _OLD_PHI,
    "mixformer-sequential": _OLD_PHI,
}

_OTHER_FAMILY = "Use a checkpoint of one of these, or --via optimum for any decoder that optimum-onnx exports"


def describe(checkpoint: Checkpoint) -> Architecture:
    """Hand the checkpoint to the family that `model_type` names.

    Raises:
        UnsupportedModelError: no such family, or a value the family does not build; the message names key and value.
        WeightError: a tensor is missing or has the wrong shape.
    """
    model_type = checkpoint.config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = f"edgephi builds {', '.join(sorted(_FAMILIES))}", _OTHER_FAMILY
        what, remedy = _REFUSED.get(str(model_type), known)
        what = f"model_type is {shown(model_type)}: {what}"
        raise UnsupportedModelError(what, where=checkpoint.config_where, remedy=remedy)
    read_config, describe_family = family
    config = Config(checkpoint.config, checkpoint.config_where)
    spec = read_config(config)
    check_keys(config, str(model_type), spec)
    check_rotary(spec, checkpoint.config_where)
    return describe_family(checkpoint)


def expected_tensors(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors a checkpoint with this config.json has, in the order a family claims them.

    Raises:
        UnsupportedModelError: see `describe`.
    """
    blueprint = Blueprint()
    describe(Checkpoint("folder", "blueprint", None, dict(config), "blueprint", blueprint, (), None))
    return {name: ref.shape for name, ref in blueprint.items()}


def check_rotary(spec: DecoderSpec, where: str) -> None:
    """Refuse head sizes that onnxruntime 1.31's GroupQueryAttention only rejects when the graph runs."""
    if spec.head_dim % 16:
        what = f"head_dim is {spec.head_dim}: GroupQueryAttention rotates heads of a multiple of 16 channels"
    elif spec.rope.dim % 16:
        what = f"{spec.rope.dim} of {spec.head_dim} channels are rotated: GroupQueryAttention takes a multiple of 16"
    else:
        return
    raise UnsupportedModelError(
        what, where=where, remedy="Use a checkpoint whose head_dim and partial_rotary_factor give multiples of 16"
    )
