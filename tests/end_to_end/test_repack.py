"""A real 4-bit GGUF file, repacked: what the issue promises about size and quality, and what the bundle says."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgephi
from edgephi.benchmarks.studies.quality import measure
from edgephi.bundle import read_manifest
from tests.end_to_end.test_command import edgephi as command

SIZE_LIMIT = 105e6
"""Bytes of the same model as Q4_K_M."""
KL_LIMIT = 0.006
"""Nats. int8 activations alone (accuracy level 4) cost 0.004; rounding to nearest 0.26."""


def test_size_and_distance_to_float32(
    smollm2_bundle: Path, smollm2_gguf: Path, shared_data: Path, tmp_path: Path
) -> None:
    edgephi.export(smollm2_gguf, tmp_path / "fp32", precision="fp32")
    text = shared_data / "wikitext2" / "test.txt"
    _, carried = measure(tmp_path / "fp32", [smollm2_bundle], text, windows=2, window_length=256).bundles
    assert carried.bytes <= SIZE_LIMIT
    assert carried.kl_mean <= KL_LIMIT
    assert carried.top1_agreement >= 0.95


def test_the_answer_is_right_and_stops(smollm2_bundle: Path) -> None:
    with edgephi.load(smollm2_bundle) as model:
        answer = model.chat("What is the capital of Japan?", max_new_tokens=40).result()
    assert answer.text == "The capital of Japan is Tokyo."
    assert answer.finish == "stop"


def test_the_manifest_says_what_was_picked_and_why(smollm2_bundle: Path) -> None:
    recipe = read_manifest(smollm2_bundle).recipe
    assert recipe.quantize is not None
    assert (recipe.quantize.asked, recipe.quantize.picked) == ("auto", "carried over")
    assert "every linear weight in 4-bit blocks of 32" in recipe.quantize.reason
    (linear,) = [group for group in recipe.weights if group.weights == "linear"]
    assert linear.method.startswith("carried over from Q4_1")


def test_the_command_says_it_too(smollm2_gguf: Path, tmp_path: Path) -> None:
    carried = command("export", smollm2_gguf, "--output", tmp_path / "a").stdout
    assert "carried over: the source holds every linear weight in 4-bit blocks of 32" in carried
    rounded = command("export", smollm2_gguf, "--output", tmp_path / "b", "--quantize", "rtn").stdout
    assert "rounded to nearest: asked for" in rounded
    assert command("export", "x", "--output", "y", "--quantize", "magic").returncode == 2


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_other_precisions_say_nothing_of_it(precision: str, smollm2_gguf: Path, tmp_path: Path) -> None:
    manifest = edgephi.export(smollm2_gguf, tmp_path / "out", precision=precision)  # type: ignore[arg-type]
    assert manifest.recipe.quantize is None
