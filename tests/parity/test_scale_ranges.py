"""Parts of one matrix may differ by a factor that something outside of it makes up for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgephi
from edgephi.errors import WeightError
from tests.decoding import Decoder
from tests.fuzz.inputs import fixture
from tests.parity.test_scales import RECIPES, exported
from tests.parity.test_scales import as_published as as_published  # fixtures
from tests.parity.test_scales import text as text
from tests.quantized import rms_distance


@pytest.mark.parametrize("power", [-14, -8, 8, 14])
@pytest.mark.parametrize("recipe", ["int8", "int4", "gptq"])
def test_parts_of_a_matrix_may_differ_by_what_makes_up_for_it(
    power: int, recipe: str, fixtures: Path, tmp_path: Path, text: Path, as_published: Callable[[str, str], Path]
) -> None:
    """Queries times a number and keys divided by it give the same scores, and lie in one matrix."""
    folder = tmp_path / "checkpoint"
    fixture("phi3-mha")(folder)
    tensors = dict(load_file(folder / "model.safetensors"))
    for name, values in tensors.items():
        if "qkv_proj" in name:
            third = len(values) // 3
            factor = np.repeat(np.float32([2.0**power, 2.0**-power, 1]), third)
            tensors[name] = values * factor[:, None]
    save_file(tensors, folder / "model.safetensors")
    reference = np.load(fixtures / "phi3-mha" / "reference.npz")
    graph = exported(folder, tmp_path / "bundle", text, **RECIPES[recipe])
    before = rms_distance(Decoder(as_published("phi3-mha", recipe)).feed(reference["input_ids"]), reference["logits"])
    after = rms_distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"])
    assert after < 1.25 * before + 1e-3


def test_blocks_that_no_power_of_two_brings_together_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    fixture("phi3-mha")(folder)
    tensors = dict(load_file(folder / "model.safetensors"))
    name = next(name for name in tensors if "qkv_proj" in name)
    tensors[name] = tensors[name] * np.repeat(np.float32([2.0**30, 2.0**-30, 1]), len(tensors[name]) // 3)[:, None]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightError, match="does not hold them together"):
        edgephi.export(folder, tmp_path / "bundle", precision="int8")


def test_a_rotation_adds_matrices_that_have_no_blocks_to_look_at(fixtures: Path, tmp_path: Path, text: Path) -> None:
    """The tied head of a rotated decoder is turned by a matrix that is made of a vector."""
    fixture("llama-tied")(tmp_path / "checkpoint")
    assert exported(tmp_path / "checkpoint", tmp_path / "bundle", text, precision="int8", rotate=True).is_file()
