"""What is read from onnxruntime's profile, and how a step is taken apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgephi.benchmarks.studies.og_overhead import profiled, take, timed


def test_operators_belong_to_the_run_they_began_in(tmp_path: Path) -> None:
    """Three runs, the first of them the prompt's: it moves no median. Microseconds."""
    events: list[dict[str, object]] = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9}]
    for start, took, kernels in ((1_000, 9_000, (5_000, 0)), (11_000, 900, (400, 200)), (13_000, 800, (300, 100))):
        events.append({"cat": "Session", "name": "model_run", "ts": start, "dur": took})
        for kind, spent in zip(("Add", "MatMul", "Add"), (*kernels, 1), strict=True):
            node = {"cat": "Node", "ts": start + 1, "args": {"op_name": kind}}
            events.append(node | {"name": f"{kind}_kernel_time", "dur": spent})
            events.append(node | {"name": f"{kind}_fence_before", "dur": 77})
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    found = profiled(path)
    assert list(found.operators.items()) == [("Add", pytest.approx(0.401)), ("MatMul", pytest.approx(0.1))]
    assert (found.in_run, found.step) == pytest.approx((0.9, 6.0))


def test_a_loop_is_taken_token_by_token() -> None:
    def start() -> tuple[int, object]:
        return 5, lambda token: timed(("wait", lambda: None), ("next", lambda: token + 1))

    taken = take(start, 3)  # type: ignore[arg-type]
    assert taken.tokens == (5, 6, 7, 8)
    assert list(taken.parts) == ["wait", "next"]
    assert taken.step_ms >= 0 and taken.processor_ms >= 0
