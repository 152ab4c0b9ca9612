"""What auto decides for float weights: the size it aims at, and how long it says that takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgephi.commands.bundles.export import about
from edgephi.export.calibrate.budget import llama_cpp_bytes
from edgephi.export.calibrate.estimate import expected_seconds
from edgephi.export.decide import decide
from edgephi.export.families import describe
from edgephi.export.families.naming import Blueprint
from edgephi.export.families.published import PUBLISHED
from edgephi.export.spec import Architecture, Checkpoint
from edgephi.export.weights.recipe import make_recipe
from edgephi.quantize.registry import quantizer


def published(model: str) -> Architecture:
    return describe(Checkpoint("folder", model, None, dict(PUBLISHED[model]), model, Blueprint(), (Path(),), None))


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        # the sizes of the files that people share: bartowski's GGUF repositories on the hub, Q4_K_M
        ("microsoft/Phi-4-mini-instruct", 2.49),
        ("microsoft/Phi-3.5-mini-instruct", 2.39),
        ("microsoft/phi-4", 9.05),
    ],
)
def test_the_size_of_q4_k_m_is_that_of_published_files(model: str, gigabytes: float) -> None:
    assert llama_cpp_bytes(published(model)) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_the_size_of_q4_k_m_is_what_llama_cpp_writes_where_rows_are_no_whole_blocks(smollm2_gguf: Path) -> None:
    from edgephi.export.checkpoint.gguf import open_gguf

    # of a file that llama-cpp-python 0.3.36 made of SmolLM2-135M: the bytes of its matrices
    assert llama_cpp_bytes(describe(open_gguf(smollm2_gguf))) == 103_527_936


def test_a_balanced_phi_is_rounded_by_importance_in_that_size() -> None:
    architecture = published("microsoft/Phi-4-mini-instruct")
    recipe, budget = decide(make_recipe("int4", 32, quantize="auto"), architecture, "balanced", None)
    assert recipe.quantize == "weighted" and budget is not None and budget.bits is not None
    assert budget.bits * architecture.parameters / 8 == pytest.approx(llama_cpp_bytes(architecture))
    # blocks that no mix has are what was asked for
    _, none = decide(make_recipe("int4", 16, quantize="auto"), architecture, "balanced", None)
    assert none is None
    assert decide(make_recipe("int4", 128, quantize="auto"), architecture, "balanced", None)[1] == budget
    _, none = decide(make_recipe("int4", 32, quantize="auto"), architecture, "fast", None)
    assert none is None


def test_estimates_grow_with_the_work_and_shrink_with_the_machine() -> None:
    mini, large = published("microsoft/Phi-4-mini-instruct"), published("microsoft/phi-4")

    def minutes(architecture: Architecture, name: str, speed: float) -> float:
        fits = name == "gptq"
        how = {"samples": fits, "mixes": True, "rescales": True}
        return expected_seconds(architecture, quantizer(name), 32, speed=speed, **how) / 60

    assert minutes(mini, "weighted", 3e11) < minutes(large, "weighted", 3e11)
    assert minutes(mini, "weighted", 3e11) < minutes(mini, "gptq", 3e11) < minutes(mini, "gptq", 1e11)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "about 10 seconds"),
        (44, "about 40 seconds"),
        (55, "about 1 minute"),
        (95, "about 2 minutes"),
        (7200, "about 2 hours"),
    ],
)
def test_an_estimate_is_said_in_round_numbers(seconds: float, words: str) -> None:
    assert about(seconds) == words
