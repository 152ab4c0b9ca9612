"""The peers' command on a small shape: edgephi is measured, peers that are not installed are rows with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgephi.benchmarks.compare_runtimes import shape
from edgephi.benchmarks.compare_runtimes.__main__ import main
from edgephi.benchmarks.compare_runtimes.results import ComparisonReport
from tests.unit.test_compare_runtimes_shape import SMALL


def test_a_run_with_absent_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "PUBLISHED", {"someone/small": SMALL})
    output = tmp_path / "report"
    arguments = ["--shape", "someone/small", "--layers", "2", "--folder", str(tmp_path / "made")]
    measured = ["--rounds", "2", "--loads", "1", "--pause", "0", "--prompts", "16", "--depths", "0,16"]
    rows = ["--edgephi", "rtn-32", "--peers", "llama.cpp,openvino", "--openvino-python", sys.executable]
    monkeypatch.setattr(sys, "argv", ["peers", *arguments, *measured, *rows, "--output", str(output)])
    main()
    report = ComparisonReport.model_validate_json((output / "peers.json").read_bytes())
    ours, *theirs = report.contenders
    assert (ours.name, ours.reason) == ("edgephi rtn-32", None)
    assert [speed.tokens for speed in ours.prefill] == [16]
    assert [speed.tokens for speed in ours.decode] == [1, 16]
    assert len(ours.decode[0].figure.values) == 2
    assert ours.loading is not None and ours.quality is None and ours.answer is None
    assert {one.name: one.reason for one in theirs[:2]} == {
        "llama.cpp Q4_0": "no interpreter was named",
        "llama.cpp Q4_K_M": "no interpreter was named",
    }
    assert theirs[2].reason is not None and "No module named 'openvino" in theirs[2].reason
    assert report.ratios == report.goals == ()
    text = (output / "peers.md").read_text(encoding="utf-8")
    assert "someone/small, 2 layers, random" in text and "**not measured**: no interpreter was named" in text
