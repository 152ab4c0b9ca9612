"""What `gpu_check` reports, and that it goes on when one figure fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgephi.benchmarks.studies import gpu_check
from edgephi.benchmarks.studies.gpu_check import CUT, FAMILIES, Report, find_gpu, shape
from edgephi.benchmarks.studies.gpu_report import compare, disagreements, markdown, rates
from edgephi.devices.detect import Machine, Missing
from edgephi.errors import DeviceError, EngineError, UsageError
from edgephi.export.families import expected_tensors

REPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "reports" / "gpu-h100"
FACTS: dict[str, Any] = {"machine": {}, "wheels": {}, "command": [], "devices": [], "vulkan": []}


def answer(logits: list[float], tokens: list[int]) -> dict[str, Any]:
    parts = [
        {"provider": "WebGpuExecutionProvider", "nodes": 9, "weight_bytes": 70},
        {"provider": "CPUExecutionProvider", "nodes": 2, "weight_bytes": 5},
    ]
    kept = [{"op_type": "Shape", "nodes": 2}]
    return {
        "first_logits": logits,
        "tokens": tokens,
        "margins": [0.5, 0.25, 2.0],
        "place": {"kind": "gpu", "placement": {"providers": parts, "kept": kept}},
    }


def test_a_comparison_is_in_units_of_the_cpus_spread() -> None:
    found = compare(answer([1.0, -1.0], [7, 8, 9]), answer([1.5, -1.0], [7, 3, 9]))
    assert found == {
        "tokens": 3,
        "equal_tokens": 1,
        "margin": 0.25,
        "difference": 0.5,
        "nodes": {"WebGpuExecutionProvider": 9, "CPUExecutionProvider": 2},
        "left_to_cpu": {"Shape": 2},
        "gpu_weight_bytes": 70,
    }
    assert compare(answer([1.0, -1.0], [7, 8, 9]), answer([1.0, -1.0], [7, 8, 9]))["margin"] is None


@pytest.mark.parametrize(
    ("recipe", "difference", "margin", "wrong"),
    [
        ("exact", 1e-5, None, False),
        ("exact", 1e-5, 2e-5, False),  # a near-tie may fall either way
        ("exact", 1e-5, 0.3, True),
        ("exact", 0.05, None, True),
        ("fast", 0.05, 0.3, False),
    ],
)
def test_only_float32_has_to_agree(recipe: str, difference: float, margin: float | None, wrong: bool) -> None:
    one = {"model": "a", "recipe": recipe, "difference": difference, "margin": margin, "equal_tokens": 3, "tokens": 9}
    assert bool(disagreements([one])) is wrong


def test_seconds_become_tokens_a_second() -> None:
    assert rates({"100": [2.0, 4.0]}, of_prompt=True) == {"100": [50.0, 25.0]}
    assert rates({"100": [0.02]}, of_prompt=False) == {"100": [50.0]}


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_model_that_edgephi_reads(family: str, tiny: bool) -> None:
    name, changes = FAMILIES[family]
    config = shape(name, {**({} if tiny else CUT), **changes}, tiny=tiny)
    assert len(expected_tensors(config)) > 10


def test_a_failure_is_recorded_and_written_and_the_next_figure_tried(tmp_path: Path) -> None:
    report = Report(tmp_path, FACTS)
    with report.attempt("first"):
        raise EngineError("the driver crashed", remedy="Update it")
    with report.attempt("second"):
        report.speed.append({"model": "a", "place": "gpu", "decode": {"0": [62.0, 60.0, 61.0]}})
    document = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert document["failures"][0].startswith("first: the driver crashed")
    assert document["speed"][0]["decode"] == {"0": [62.0, 60.0, 61.0]}
    text = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    assert "61 (60–62)" in text and "failed: first" in text


def test_a_software_drivers_report_says_so() -> None:
    empty = {"comparisons": [], "speed": [], "failures": []}
    assert "software driver computed" in markdown({**FACTS, **empty, "software": True})
    assert "software driver computed" not in markdown({**FACTS, **empty, "software": False})


def test_without_a_gpu_the_reason_of_detection_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = (Missing("webgpu", "device", "no GPU is there", "Install its driver"),)
    nothing = Machine("linux", "x86_64", None, 1, 1, "mains", (), missing)  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_check, "survey", lambda names: nothing)
    with pytest.raises(DeviceError, match="no GPU is there"):
        find_gpu(software=True)


def test_it_has_to_be_told_what_to_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path)])
    with pytest.raises(UsageError, match="nothing to check"):
        gpu_check.main()


def test_the_kept_report_is_what_its_record_gives() -> None:
    document = json.loads((REPORT / "gpu_check.json").read_text(encoding="utf-8"))
    assert (REPORT / "gpu_check.md").read_text(encoding="utf-8") == markdown(document)
    assert document["failures"] == disagreements(document["comparisons"])
