"""What is read from onnxruntime's profile, and how a step is taken apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgephi.benchmarks.og_overhead import profiled, take, timed


def test_operators_are_counted_as_far_as_the_runs_that_were_asked_for(tmp_path: Path) -> None:
    """Three runs, the first of them the prompt's. Microseconds."""
    events: list[dict[str, object]] = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9}]
    for start, kernels in ((1_000, (500, 0)), (3_000, (400, 200)), (5_000, (300, 100))):
        events.append({"cat": "Session", "name": "model_run", "ts": start, "dur": 900})
        for kind, spent in zip(("Add", "MatMul"), kernels, strict=True):
            node = {"cat": "Node", "ts": start + 1, "args": {"op_name": kind}}
            events.append(node | {"name": f"{kind}_kernel_time", "dur": spent})
            events.append(node | {"name": f"{kind}_fence_before", "dur": 77})
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    found = profiled(path, 2)
    assert list(found.operators.items()) == [("Add", pytest.approx(0.35)), ("MatMul", pytest.approx(0.15))]
    assert (found.in_run, found.step) == pytest.approx((0.9, 2.0))


def test_a_loop_is_taken_token_by_token() -> None:
    def start() -> tuple[int, object]:
        return 5, lambda token: timed(("wait", lambda: None), ("next", lambda: token + 1))

    taken = take(start, 3)  # type: ignore[arg-type]
    assert taken.tokens == (5, 6, 7, 8)
    assert list(taken.parts) == ["wait", "next"]
    assert taken.step_ms >= 0 and taken.processor_ms >= 0
