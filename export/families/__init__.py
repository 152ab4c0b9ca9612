"""One file per model family: a published configuration and its tensors become a DecoderSpec and canonical weights."""

from __future__ import annotations

from edgephi.errors import UnsupportedModelError
from edgephi.export.families import llama, phi3
from edgephi.export.spec import Architecture, Checkpoint

_FAMILIES = {"llama": llama.describe, "phi3": phi3.describe}


def describe(checkpoint: Checkpoint) -> Architecture:
    """Hand the checkpoint to the family that `model_type` names.

    Raises:
        UnsupportedModelError: no such family, or a value the family does not build; the message names key and value.
        WeightError: a tensor is missing or has the wrong shape.
    """
    model_type = checkpoint.config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"model_type is {model_type!r}: edgephi builds {', '.join(sorted(_FAMILIES))}",
            where=checkpoint.config_where,
            remedy="Use a checkpoint of one of these",
        )
    return family(checkpoint)
