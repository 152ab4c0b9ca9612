"""The line through times of models cut to several depths."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgephi.benchmarks.bench.measure import Sample
from edgephi.benchmarks.studies import layer_growth
from edgephi.benchmarks.studies.layer_growth import fit, milliseconds
from edgephi.errors import UsageError


def test_a_line_is_found_and_carried_on() -> None:
    line = fit([1, 2, 4, 8], [5 + 3 * layers for layers in (1, 2, 4, 8)])
    assert (line.start, line.per_layer, line.r2) == pytest.approx((5, 3, 1))
    assert line.at(32) == pytest.approx(101)


def test_least_squares_is_the_normal_equations_answer() -> None:
    layers, values = np.array([1, 2, 4, 8]), np.array([4.0, 9.0, 11.0, 30.0])
    design = np.stack([np.ones(4), layers], axis=1)
    start, slope = np.linalg.solve(design.T @ design, design.T @ values)
    line = fit(layers.tolist(), values.tolist())
    assert (line.start, line.per_layer) == pytest.approx((start, slope))
    left = values - design @ [start, slope]
    assert line.r2 == pytest.approx(1 - left @ left / ((values - values.mean()) ** 2).sum())


def test_times_are_medians_a_token() -> None:
    samples = [Sample((1, 2, 3), first, (0.01, step), 0.6, 0.0, 0.5) for first, step in ((1, 0.03), (2, 0.05), (9, 9))]
    assert milliseconds(samples, 100, 3) == pytest.approx((20, 30, 200))


@pytest.mark.parametrize("arguments", [["--layers", "4"], ["--layers", "0", "2"], ["--tokens", "1"]])
def test_one_depth_is_no_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["layer_growth", "--folder", str(tmp_path), *arguments])
    with pytest.raises(UsageError, match="two numbers of layers"):
        layer_growth.main()
