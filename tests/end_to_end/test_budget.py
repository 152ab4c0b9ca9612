"""`edgephi.export_model` under a budget: what is in the folder, what the manifest says of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import edgephi
from edgephi.bundle import read_manifest
from edgephi.commands.app import app
from edgephi.errors import UsageError
from edgephi.export.calibrate import importance, sensitivity
from edgephi.export.graph.builder import DATA_FILE
from tests.end_to_end.test_export import checkpoint as checkpoint  # the fixture


@pytest.mark.parametrize("quantize", ["rtn", "gptq"])
def test_the_data_file_keeps_to_the_budget_and_the_manifest_says_how(
    quantize: str, checkpoint: Path, tmp_path: Path
) -> None:
    four = edgephi.export(checkpoint, tmp_path / "four", quantize="rtn")
    eight = edgephi.export(checkpoint, tmp_path / "eight", precision="int8")
    sizes = [(tmp_path / name / DATA_FILE).stat().st_size for name in ("four", "eight")]
    budget = sum(sizes) // 2
    mixed = edgephi.export(checkpoint, tmp_path / "a", quantize=quantize, target_size=budget)
    edgephi.export(checkpoint, tmp_path / "b", quantize=quantize, target_size=f"{budget}B")
    assert sizes[0] < (tmp_path / "a" / DATA_FILE).stat().st_size <= budget
    assert four.bits_per_weight < mixed.bits_per_weight < eight.bits_per_weight
    written = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert written.keys() == {path.name for path in (tmp_path / "four").iterdir()}, "nothing of the measurement stays"

    recipe = read_manifest(tmp_path / "a").recipe
    assert recipe.budget is not None and (recipe.budget.bits, recipe.budget.bytes) == (None, budget)
    assert recipe.budget.measure == (importance.MEASURE if quantize == "gptq" else sensitivity.MEASURE)
    assert recipe.calibration is not None
    linear = [group for group in recipe.weights if group.weights == "linear"]
    assert {group.bits for group in linear} == {4, 8} and all(group.names for group in linear)
    assert sum(group.parameters for group in linear) == next(
        group.parameters for group in four.recipe.weights if group.weights == "linear"
    )
    assert all(("GPTQ" in group.method) == (quantize == "gptq" and group.bits == 4) for group in linear)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "a")], env={"COLUMNS": "300"}).output
    assert f"{budget:,} bytes of weights" in shown and str(linear[0].names) in shown


def test_what_contradicts_a_budget_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mixes blocks of 32, 64, 128"):
        edgephi.export(checkpoint, tmp_path / "out", bits=6, block_size=256)
    with pytest.raises(UsageError, match="chooses bits itself"):
        edgephi.export(checkpoint, tmp_path / "out", bits=6, precision="int8")
    with pytest.raises(UsageError, match="only rounded"):
        edgephi.export(checkpoint, tmp_path / "out", bits=6, via="optimum")
    with pytest.raises(UsageError, match=r"Ask for --bits \d+\.\d\d or more"):
        edgephi.export(checkpoint, tmp_path / "out", bits=1)
    assert not (tmp_path / "out").exists()
