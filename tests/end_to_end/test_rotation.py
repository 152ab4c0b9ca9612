"""`edgephi export --rotate` on real weights: the float model's answers stay, and the bundle says what was done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import edgephi
from edgephi.bundle import read_manifest
from edgephi.commands.app import app
from edgephi.errors import UsageError
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.decide import decide
from edgephi.export.families import describe
from edgephi.export.weights.recipe import make_recipe
from edgephi.export.weights.rotation import rotate_architecture
from tests.decoding import Decoder, distance


def test_fp32_logits_of_smollm2_stay(smollm2_gguf: Path, tmp_path: Path) -> None:
    """576 = 24 · 24 channels, a tied embedding, and weights that lay on a 4-bit grid."""
    ids = np.random.default_rng(0).integers(0, 49152, (1, 64))
    plain = edgephi.export(smollm2_gguf, tmp_path / "plain", precision="fp32")
    turned = edgephi.export(smollm2_gguf, tmp_path / "turned", precision="fp32", rotate=True)
    expected, logits = (Decoder(tmp_path / name / "model.onnx").feed(ids) for name in ("plain", "turned"))
    assert distance(logits, expected) < 1e-4
    assert turned.model == plain.model
    assert turned.stored_bytes < plain.stored_bytes + 2 * 4 * 576 * 576


def test_rotated_weights_are_not_carried_over_and_the_manifest_says_that_they_are_rotated(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    arguments = ["export", str(smollm2_gguf), "-o", str(folder), "--rotate", "--seed", "7", "--quantize", "rtn"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    recipe = read_manifest(folder).recipe
    assert recipe.rotation_seed == 7
    assert recipe.quantize is not None and recipe.quantize.picked == "rounded to nearest"
    rotated = rotate_architecture(describe(open_gguf(smollm2_gguf)), 7)
    auto, _ = decide(make_recipe("int4", 32, 4, "auto", 7), rotated, "balanced", None)
    assert auto.quantize == "gptq", "with nothing to carry over, auto fits"
    shown = CliRunner().invoke(app, ["inspect", str(folder)]).output
    assert "residual stream and values, seed 7" in shown


def test_a_graph_of_optimums_is_not_rotated(smollm2_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--rotate"):
        edgephi.export(smollm2_gguf, tmp_path / "bundle", rotate=True, via="optimum")
    assert list(tmp_path.iterdir()) == []
