"""The table of targets says what was measured, against what, and by how much a target was missed."""

from pathlib import Path

import pytest

from edgephi.benchmarks.studies.quality import BundleQuality, QualityReport
from edgephi.benchmarks.studies.quantization_sweep import (
    Answers,
    SweepResult,
    SweepVariant,
    Target,
    decode_ratios,
    sentences,
    table,
)
from edgephi.errors import EdgephiError


def bundle(name: str, kl: float) -> BundleQuality:
    return BundleQuality(name, 102_500_000, 5.83, 30.8, kl, 10 * kl, 0.962)


def test_a_verdict_is_the_best_target_that_holds_or_the_distance_to_the_one_that_does_not() -> None:
    target = Target(must=0.13, aim=0.08)
    assert target.verdict(0.08) == "aim met"
    assert target.verdict(0.1) == "must met"
    assert target.verdict(0.15) == "missed by 0.02"


def test_every_way_has_its_row_and_the_reference_comes_first() -> None:
    variants = (SweepVariant("auto", target=Target(0.03, 0.006)), SweepVariant("rtn-b32", "rtn"))
    rows = table(variants, [bundle("fp32", 0.0), bundle("auto", 0.0039), bundle("rtn-b32", 0.26)]).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["fp32", "auto", "rtn-b32"]
    assert cells[1][4:] == ["0.0039", "96.2 %", "0.03", "0.006", "aim met"]
    assert cells[2][4:] == ["0.26", "96.2 %", "–", "–", ""]


def test_speed_is_a_median_with_its_quartiles_and_answers_are_points_apart() -> None:
    quality = QualityReport("text.txt", 8, 512, 4088, (bundle("fp32", 0.0),))
    answers = Answers(1838, float_model=(0.650, 0.663), auto=(0.647, 0.664))
    speed, points = sentences(SweepResult(quality, (0.8, 0.96, 0.9, 0.7, 0.94), answers))
    assert "0.900 (median of 5 rounds in turns, quartiles 0.800 and 0.940" in speed
    assert "plain 65.0 and 64.7 % (-0.3 points), normalized 66.3 and 66.4 % (+0.1 points)" in points
    assert sentences(SweepResult(quality, (), None)) == []


def test_a_bundle_is_about_as_fast_as_itself_in_every_load_and_round(smollm2_bundle: Path) -> None:
    ratios = decode_ratios(smollm2_bundle, smollm2_bundle, loads=2, rounds=3, tokens=40)
    assert len(ratios) == 6 and len(set(ratios)) == 6
    assert 0.5 < sorted(ratios)[3] < 2


def test_a_bundle_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgephiError, match="nothing-here"):
        decode_ratios(tmp_path / "nothing-here", tmp_path / "nothing-here", loads=2, rounds=1, tokens=20)
