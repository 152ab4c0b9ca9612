"""`edgephi evaluate --scheduler` with real Dask workers, one of which is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgephi.benchmarks.cluster import client
from edgephi.benchmarks.cluster.client import count_workers
from edgephi.benchmarks.evaluate import layer_errors, spread
from edgephi.benchmarks.evaluate.evaluation import Scores, evaluate, score_sequences
from edgephi.benchmarks.evaluate.windows import WindowScores
from edgephi.benchmarks.studies.quality import tokenize
from edgephi.commands.app import app
from edgephi.errors import ClusterError, UsageError
from tests.dask_machines import Machines, machines, measuring, wait_for
from tests.unit.test_evaluation import bundle_of
from tests.unit.test_quality import CASE, make_bundle
from tests.unit.test_quality import text as text  # the fixture

WINDOWS, LENGTH = 6, 4
RESOURCE = f"{client.RESOURCE}=1"


@pytest.fixture
def several(tmp_path: Path) -> Iterator[Machines]:
    pytest.importorskip("distributed", reason="Dask is not installed (extra: cluster)")
    with machines(tmp_path) as found:
        yield found


@pytest.fixture
def four_bits(fixtures: Path, tmp_path: Path) -> Path:
    return bundle_of(make_bundle(fixtures, tmp_path / "int4", "int4"), "int4")


def asked(bundle: Path, against: Path, text: Path) -> list[str]:
    words = ["evaluate", str(bundle), "--against", str(against), "--text", str(text), "--json"]
    return [*words, "--windows", str(WINDOWS), "--window-length", str(LENGTH)]


def answered(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    for name in ("seconds", "peak_memory_bytes"):
        del found[name]
    return found


def test_a_lost_workers_windows_are_scored_again_and_the_figures_are_the_same(
    four_bits: Path, fixtures: Path, text: Path, several: Machines, tmp_path: Path
) -> None:
    words = asked(four_bits, fixtures / CASE, text)
    here = CliRunner().invoke(app, words)
    assert here.exit_code == 0, here.output
    several.scheduler()
    first, second = several.worker("first", RESOURCE), several.worker("second", RESOURCE)
    wait_for(lambda: count_workers(several.address, client.RESOURCE) == 2, second)
    command = [sys.executable, "-m", "edgephi", *words, "--scheduler", several.address]
    with (tmp_path / "err").open("wb") as err:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, env=os.environ)
    wait_for(lambda: measuring(first, spread.SCORE), running)
    first.kill()
    out, _ = running.communicate(timeout=120)
    assert running.returncode == 0, (tmp_path / "err").read_text()
    assert answered(out.decode()) == answered(here.stdout), "every figure, to the last bit, and every layer's error"
    assert second.poll() is None


def test_what_a_worker_refuses_names_the_worker(
    four_bits: Path, text: Path, several: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    several.scheduler()
    several.worker("the desk", RESOURCE)
    monkeypatch.setattr(spread, "library_versions", lambda *names: {"edgephi": "0.0.9"})
    with pytest.raises(
        ClusterError, match=r"windows 1 to 1 could not be scored: worker the desk: .* instead of 0\.0\.9"
    ):
        evaluate(four_bits, text=text, windows=1, window_length=LENGTH, scheduler=several.address)


def test_shares_put_together_are_what_one_process_scores(four_bits: Path, fixtures: Path, text: Path) -> None:
    cut = list(tokenize([four_bits], text, WINDOWS * LENGTH).reshape(WINDOWS, LENGTH))
    against = str(fixtures / CASE)
    whole = score_sequences(four_bits, against, cut)
    answers = [
        {"scores": json.loads(json.dumps(spread.score_share(str(four_bits), against, [ids.tolist() for ids in share])))}
        for share in (cut[:1], cut[1:4], cut[4:])
    ]
    assert lists(spread._together(answers)) == lists(whole)
    assert len(whole.layer_ratios) == WINDOWS


def test_scores_of_other_windows_are_not_taken(four_bits: Path, text: Path) -> None:
    cut = list(tokenize([four_bits], text, 2 * LENGTH).reshape(2, LENGTH))
    scores = spread.score_share(str(four_bits), None, [ids.tolist() for ids in cut])
    assert spread._fit({"scores": scores}, cut)
    fewer = {"windows": scores["windows"][:1]}
    shorter = {"windows": [one | {"loss": one["loss"][:-1]} for one in scores["windows"]]}
    for wrong in (fewer, shorter, {}, {"windows": [{}, {}]}, {"windows": [{**scores["windows"][0], "loss": "x"}] * 2}):
        assert not spread._fit({"scores": wrong}, cut), wrong
    assert not spread._fit({}, cut)


def lists(scores: Scores) -> tuple[object, ...]:
    ratios = [[layer.tolist() for layer in layers] for layers in scores.layer_ratios]
    return scores.against, scores.kv_cache, [window.as_lists() for window in scores.windows], ratios


def test_layers_are_compared_on_as_many_windows_as_one_process_keeps(
    four_bits: Path, fixtures: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = list(tokenize([four_bits], text, WINDOWS * LENGTH).reshape(WINDOWS, LENGTH))
    whole = score_sequences(four_bits, str(fixtures / CASE), cut)
    layers, hidden = len(whole.layer_ratios[0]), 48
    of_a_window = layers * LENGTH * hidden * 4
    for limit in (1, of_a_window, 3 * of_a_window, 3 * of_a_window + 1, 4 * of_a_window - 1):
        monkeypatch.setattr(layer_errors, "STATES_LIMIT", limit)
        kept = len(layer_errors.LayerErrors(four_bits, cut).ratios)
        assert kept == layer_errors.windows_compared(layers, LENGTH, hidden), limit


def test_scores_keep_every_bit_through_json(four_bits: Path, text: Path) -> None:
    cut = list(tokenize([four_bits], text, LENGTH).reshape(1, LENGTH))
    (window,) = score_sequences(four_bits, None, cut).windows
    again = WindowScores.from_lists(json.loads(json.dumps(window.as_lists())))
    assert again.loss.tobytes() == window.loss.tobytes() and again.kl is None


def test_what_cannot_be_spread_is_refused_first(four_bits: Path, text: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
    with pytest.raises(UsageError, match="questions are answered on this machine only"):
        evaluate(four_bits, text=text, windows=1, window_length=LENGTH, choices=questions, scheduler="tcp://x:1")
    with pytest.raises(UsageError, match="may be other weights on another machine"):
        spread.score_on_workers(four_bits, "org/model", [], "tcp://x:1", print, lambda task, steps: None)  # type: ignore[arg-type, return-value]
