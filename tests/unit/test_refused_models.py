"""Relatives of the supported models are refused by what they are, with what to use instead."""

from __future__ import annotations

import pytest

from edgephi.errors import UnsupportedModelError
from edgephi.export.families import describe
from edgephi.export.spec import Checkpoint


@pytest.mark.parametrize(
    ("model_type", "what", "remedy"),
    [
        ("phi4flash", "Phi-4-mini-flash-reasoning", "microsoft/Phi-4-mini-reasoning"),
        ("phi3_v", "Phi-3-vision", "microsoft/Phi-3.5-mini-instruct"),
        ("phi-msft", "as first published", "current revision"),
        ("mixformer-sequential", "as first published", "current revision"),
        ("mamba", "edgephi builds llama, phi", "one of these"),
        (["phi3"], "edgephi builds", "one of these"),
        (None, "edgephi builds", "one of these"),
    ],
)
def test_the_error_says_what_it_is_and_what_to_do(model_type: object, what: str, remedy: str) -> None:
    checkpoint = Checkpoint("folder", "model", None, {"model_type": model_type}, "config.json", {}, (), None)
    with pytest.raises(UnsupportedModelError) as refusal:
        describe(checkpoint)
    assert repr(model_type) in refusal.value.what and what in refusal.value.what
    assert remedy in refusal.value.remedy
    assert refusal.value.where == "config.json"
