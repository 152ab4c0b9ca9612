"""Peers in one run: the children's protocol, failures that become rows, the order of runs, ratios and goals."""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from edgephi.benchmarks.bench.meters.memory import held
from edgephi.benchmarks.bench.results import figure
from edgephi.benchmarks.compare_runtimes.goals import goals, ratios
from edgephi.benchmarks.compare_runtimes.measure import (
    Case,
    Tally,
    measure_loading,
    measure_quality,
    measure_rounds,
    order,
)
from edgephi.benchmarks.compare_runtimes.picture import Box, picture, place_labels
from edgephi.benchmarks.compare_runtimes.prepare import claim_folder, prepare
from edgephi.benchmarks.compare_runtimes.process import RuntimeProcess
from edgephi.benchmarks.compare_runtimes.results import (
    ComparisonReport,
    ContenderResult,
    Loading,
    Peer,
    Quality,
    Settings,
    Speed,
)
from edgephi.benchmarks.compare_runtimes.table import markdown
from edgephi.benchmarks.compare_runtimes.variants import CHILDREN, PEERS, Contender, contenders
from edgephi.errors import EngineError, UsageError

PYTHON = Path(sys.executable)
COUNTING = """
import os, time
import numpy as np
LIBRARIES = ("numpy", "no-such-library")
os.write(1, b"a native library says hello\\n")
def open_model(settings):
    if settings.get("broken"):
        raise ValueError("these weights are broken")
    return Model(settings)
class Model:
    def __init__(self, settings):
        self.settings = settings
    def start(self, capacity):
        print("noise on standard output")
        if self.settings.get("dies"):
            os._exit(7)
        self.capacity = capacity
    def generate(self, ids, count, on_token):
        assert self.capacity == len(ids) + count
        time.sleep(0.05)
        for index in range(count):
            on_token(ids[-1] + 1 + index)
            time.sleep(0.01)
    def logits(self, ids):
        return np.eye(11, dtype=np.float32)[ids] * self.settings.get("sharpness", 3.0)
"""


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "counting.py"
    path.write_text(COUNTING, encoding="utf-8")
    return path


def child(engine: Path, tmp_path: Path, **more: Any) -> RuntimeProcess:
    return RuntimeProcess(PYTHON, engine, tmp_path / "log", os.environ, **more)


def contender(engine: Path, name: str = "one", peer: Peer = "builder", **settings: object) -> Contender:
    return Contender(name, peer, PYTHON, engine, settings, engine, "a note")


def starter(tmp_path: Path) -> Any:
    return lambda one: RuntimeProcess(one.python, one.engine, tmp_path / "log", one.environment())


def test_a_child_answers_requests_while_its_libraries_print(engine: Path, tmp_path: Path) -> None:
    with child(engine, tmp_path) as peer:
        assert peer.hello["libraries"] == {"numpy": np.__version__}
        loaded = peer.ask("load", settings={})
        run = peer.ask("run", ids=[3, 4], count=4)
        peer.ask("logits", ids=[1, 2], file=str(tmp_path / "logits.npy"))
    assert 0 <= loaded["seconds"] < 5
    assert run["tokens"] == [5, 6, 7, 8]
    assert run["first_s"] >= 0.05 and run["rest_s"] >= 0.03
    assert np.load(tmp_path / "logits.npy").shape == (2, 11)
    assert "a native library says hello" in (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count otherwise")
def test_memory_of_a_child_is_counted_as_edgephi_counts_its_own(engine: Path, tmp_path: Path) -> None:
    from edgephi.benchmarks.compare_runtimes.children.serve import memory

    here, there = memory(), held()
    assert here["private"] == pytest.approx(there.private, rel=0.05)
    assert here["file_backed"] == pytest.approx(there.file_backed, rel=0.05)


def test_children_run_where_edgephi_is_not_installed() -> None:
    for file in CHILDREN.glob("*.py"):
        if file.name != "with_edgephi.py":
            assert "import edgephi" not in (text := file.read_text(encoding="utf-8"))
            assert "from edgephi" not in text, file


def test_a_request_that_fails_says_why_and_the_child_lives_on(engine: Path, tmp_path: Path) -> None:
    with child(engine, tmp_path) as peer:
        with pytest.raises(EngineError, match="ValueError: these weights are broken"):
            peer.ask("load", settings={"broken": True})
        assert "seconds" in peer.ask("load", settings={})


@pytest.mark.parametrize(
    "text, reason",
    [
        ("import no_such_runtime", "No module named 'no_such_runtime'"),
        ("import os; os._exit(3)", "status 3: it said nothing"),
    ],
)
def test_a_child_that_does_not_start_leaves_its_last_words(text: str, reason: str, tmp_path: Path) -> None:
    engine = tmp_path / "failing.py"
    engine.write_text(text, encoding="utf-8")
    with pytest.raises(EngineError, match=reason):
        child(engine, tmp_path)


def test_an_interpreter_that_is_not_there_and_one_that_is_silent(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not start"):
        RuntimeProcess(tmp_path / "no-python", engine, tmp_path / "log", os.environ)
    engine.write_text("import time; time.sleep(60)", encoding="utf-8")
    with pytest.raises(EngineError, match=r"no answer in 0\.5 s"):
        child(engine, tmp_path, timeout_s=0.5)


def test_every_failure_becomes_a_reason_and_the_others_go_on(engine: Path, tmp_path: Path) -> None:
    tallies = [
        Tally(contender(engine, "sound")),
        Tally(contender(engine, "broken", broken=True)),
        Tally(contender(engine, "dies", dies=True)),
        Tally(contender(engine, "unmade"), reason="could not be made"),
    ]
    steps: list[int] = []
    begin = starter(tmp_path)
    cases = [Case((1,), 3), Case((1, 2, 3), 1)]
    measure_loading(tallies, begin, [1, 2], 2, lambda: steps.append(1))
    measure_rounds(tallies, begin, cases, rounds=2, seed=0, pause_s=0, question=[5], advance=lambda: steps.append(1))
    assert len(steps) == 4 * 2 + 4 * 2 * 3
    sound, broken, dies, unmade = tallies
    assert sound.reason is None and sound.loading is not None and len(sound.loading.load_s.values) == 2
    assert {length: len(runs) for length, runs in sound.runs.items()} == {1: 2, 3: 2}
    assert sound.answer is not None and sound.answer[:3] == (6, 7, 8)
    assert broken.reason == "ValueError: these weights are broken" and broken.loading is None
    assert dies.reason is not None and "status 7" in dies.reason and not dies.runs
    assert unmade.reason == "could not be made"


def test_speeds_are_tokens_over_their_own_time(engine: Path) -> None:
    tally = Tally(contender(engine), runs={512: [{"first_s": 2.0, "rest_s": 0.5, "tokens": [1] * 11}]})
    assert tally.speeds(512, "prefill") == [256.0]
    assert tally.speeds(512, "decode") == [20.0]  # 10 tokens after the first


def test_divergence_is_the_formula_s(engine: Path, tmp_path: Path) -> None:
    tally = Tally(contender(engine, sharpness=2.0))
    windows = np.array([[1, 2, 3], [4, 5, 6]])
    expected = [(np.eye(11)[ids] * 3.0).astype(np.float32) for ids in windows]
    measure_quality([tally], starter(tmp_path), windows, expected, tmp_path, lambda: None)
    p, q = (np.exp(np.eye(11)[0] * s) / np.exp(np.eye(11)[0] * s).sum() for s in (3.0, 2.0))
    assert tally.reason is None and tally.quality is not None
    assert tally.quality.predictions == 4
    assert tally.quality.kl_mean == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert tally.quality.top1_agreement == 1


def test_everybody_runs_a_case_before_the_next_one_comes() -> None:
    plan = list(order(3, rounds=40, cases=3, contenders=4))
    assert Counter(plan) == {(r, c, p): 1 for r in range(40) for c in range(3) for p in range(4)}
    blocks = [[one for _, _, one in group] for _, group in groupby(plan, key=lambda step: step[:2])]
    assert len(blocks) == 120 and all(sorted(block) == [0, 1, 2, 3] for block in blocks)
    first = Counter(block[0] for block in blocks)
    assert min(first.values()) > 15  # nobody is always the first
    assert plan == list(order(3, 40, 3, 4)) != list(order(4, 40, 3, 4))


def row(
    name: str, peer: Peer, speeds: Mapping[str, list[float]], kl: float | None = None, **more: Any
) -> ContenderResult:
    quality = None
    if kl is not None:
        quality = Quality(predictions=9, perplexity=20.0, kl_mean=kl, kl_p99=9 * kl, top1_agreement=0.9)
    return ContenderResult(
        name=name,
        peer=peer,
        libraries={"lib": "1.0"},
        bytes=10**8,
        note="a note",
        reason=more.pop("reason", None),
        quality=quality,
        **{metric: (Speed(tokens=512, figure=figure(values)),) for metric, values in speeds.items()},  # type: ignore[arg-type]
        **more,
    )


def loading(seconds: list[float], private: list[float]) -> Loading:
    return Loading(
        load_s=figure(seconds),
        first_answer_s=figure(seconds),
        private_imported=figure([10e6] * len(private)),
        private_loaded=figure(private),
        file_backed_loaded=None,
        private_answered=figure(private),
        file_backed_answered=None,
    )


OURS = row("edgephi auto", "edgephi", {"prefill": [120, 240, 130], "decode": [50, 50, 50]}, 0.01)
Q4_0 = row("llama.cpp Q4_0", "llama.cpp", {"prefill": [100, 100, 100], "decode": [30, 30, 30]}, 0.3)
Q4_K = row("llama.cpp Q4_K_M", "llama.cpp", {"prefill": [80, 80, 80], "decode": [45, 45, 45]}, 0.005)


def test_ratios_are_taken_within_rounds() -> None:
    rival = row("og", "builder", {"prefill": [60, 240, 100]})
    (ratio,) = ratios([OURS, rival])
    assert ratio.ratio == median([120 / 60, 240 / 240, 130 / 100])
    assert (ratio.ours, ratio.theirs, ratio.metric, ratio.tokens) == ("edgephi auto", "og", "prefill", 512)


def test_the_goal_is_1_2_times_the_fastest_format_of_llama_cpp_at_no_worse_divergence() -> None:
    results = [OURS, Q4_0, Q4_K]
    prefill, decode = goals(results, ratios(results))
    assert (prefill.theirs, prefill.ratio, prefill.no_worse_kl, prefill.met) == ("llama.cpp Q4_0", 1.3, True, True)
    assert decode.theirs == "llama.cpp Q4_K_M" and decode.ratio == pytest.approx(50 / 45)
    assert decode.no_worse_kl is False and not decode.met
    faster = [OURS, row("llama.cpp Q4_K_M", "llama.cpp", {"prefill": [80] * 3}, 0.005)]
    (only,) = goals(faster, ratios(faster))
    assert only.ratio >= 1.2 and not only.met  # fast enough, and further from the float model


def test_load_may_take_half_and_memory_a_quarter_of_the_builder_s() -> None:
    ours = row("edgephi auto", "edgephi", {}, loading=loading([0.2, 0.2], [30e6, 30e6]))
    theirs = row("og", "builder", {}, loading=loading([0.5, 0.5], [100e6, 100e6]))
    load, memory, beyond = goals([ours, theirs], ratios([ours, theirs]))
    assert (load.metric, load.bound, load.ratio, load.met, load.no_worse_kl) == ("load", 0.5, 0.4, True, None)
    assert (memory.metric, memory.bound, memory.ratio, memory.met) == ("private memory", 0.25, 0.3, False)
    assert (beyond.metric, beyond.met) == ("private beyond imports", True)
    assert beyond.ratio == pytest.approx((30 - 10) / (100 - 10))


def report(*results: ContenderResult, windows: int = 4) -> ComparisonReport:
    found = ratios(results)
    return ComparisonReport(
        machine={"cpu": "one"},
        weights="weights.gguf",
        settings=Settings(
            threads=2,
            prompts=(512,),
            depths=(512,),
            new_tokens=32,
            rounds=3,
            loads=2,
            pause_s=0.25,
            seed=0,
            windows=windows,
            window_length=512,
            text="text.txt",
        ),
        contenders=results,
        ratios=tuple(found),
        goals=tuple(goals(results, found)),
    )


def test_the_table_has_everybody_and_says_what_is_missed_by_how_much() -> None:
    absent = row("OpenVINO GenAI", "openvino", {}, reason="the process ended with status 1: no such module")
    text = markdown(report(OURS, Q4_0, Q4_K, absent))
    assert "| OpenVINO GenAI" in text and "**not measured**: the process ended with status 1: no such module" in text
    assert "2 threads for everybody" in text
    (decode,) = [line for line in text.splitlines() if line.startswith("| edgephi auto, decode at 512")]
    assert "≥ 1.2" in decode and "missed: by 7 %, KL is worse" in decode  # 50 / 45 is 7 % below 1.2
    (prefill,) = [line for line in text.splitlines() if line.startswith("| edgephi auto, prefill 512")]
    assert [cell.strip() for cell in prefill.split("|")[2:-1]] == ["llama.cpp Q4_0", "≥ 1.2", "1.30", "met"]


def test_random_weights_have_no_divergence_and_the_table_says_so() -> None:
    ours = row("edgephi auto", "edgephi", {"prefill": [130.0]})
    theirs = row("llama.cpp Q4_0", "llama.cpp", {"prefill": [100.0]})
    text = markdown(report(ours, theirs, windows=0))
    assert "No KL divergence" in text and "met (KL not measured)" in text


def test_the_document_reads_back() -> None:
    document = report(OURS, Q4_0)
    assert ComparisonReport.model_validate_json(document.model_dump_json()) == document


def test_the_picture_has_every_measured_runtime_and_no_name_on_another(tmp_path: Path) -> None:
    text = picture(report(OURS, Q4_0))
    assert text is not None
    root = ET.fromstring(text)
    names = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert names.count(OURS.name) == names.count(Q4_0.name) == 2
    assert picture(report(row("edgephi auto", "edgephi", {"prefill": [1.0]}))) is None


def test_names_of_dots_in_one_place_move_apart() -> None:
    marks = [Box(100 + n, 100, 112 + n, 112) for n in range(12)]
    names = [f"runtime {'x' * n}" for n in range(12)]
    area = Box(0, 0, 600, 400)
    labels = place_labels(marks, names, area)
    everything = [*marks, *labels]
    for index, label in enumerate(labels):
        assert not any(label.meets(other) for other in everything if other is not label), names[index]
        assert label.left >= 0 and label.right <= 600 and label.top >= 0 and label.bottom <= 400
    assert place_labels(marks[:1], ["x" * 500], area)[0].left == 114, "what fits nowhere is beside its dot"


def everybody(tmp_path: Path, file_type: int | None, **more: Any) -> list[Contender]:
    return contenders(
        tmp_path / "source.gguf",
        tmp_path,
        variants=more.pop("variants", ["auto"]),
        peers=PEERS,
        pythons={},
        threads=2,
        capacity=1024,
        file_type=file_type,
    )


def test_llama_cpp_also_gets_a_4_bit_source_as_it_is(tmp_path: Path) -> None:
    names = [one.name for one in everybody(tmp_path, file_type=3)]
    assert names[:4] == ["edgephi auto", "llama.cpp Q4_0", "llama.cpp Q4_K_M", "llama.cpp Q4_1"]
    own = next(one for one in everybody(tmp_path, file_type=2) if one.name == "llama.cpp Q4_0")
    assert own.made == tmp_path / "source.gguf"
    assert "llama.cpp Q4_1" not in [one.name for one in everybody(tmp_path, file_type=1)]
    assert {one.settings["threads"] for one in everybody(tmp_path, file_type=1)} == {2}


def test_both_ways_to_compute_prompts_run_one_bundle(tmp_path: Path) -> None:
    blocks, integers, *_ = everybody(tmp_path, file_type=3, variants=["auto", "auto-integers"])
    assert (blocks.made, blocks.settings["prefill"]) == (integers.made, "blocks")
    assert integers.settings["prefill"] == "integers"
    assert blocks.variables != integers.variables  # `auto` would find in one cache what the other makes


def test_a_peer_without_an_interpreter_has_that_as_its_reason(tmp_path: Path) -> None:
    for one in everybody(tmp_path, file_type=1)[1:]:
        tally = Tally(one)
        with tally.attempt():
            prepare(one, tmp_path / "source.gguf", tmp_path)
        assert tally.reason == "no interpreter was named"


def test_a_way_nobody_knows_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'q5'"):
        everybody(tmp_path, file_type=1, variants=["q5"])


def test_a_user_s_choices_do_not_reach_the_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPHI_PREPACKED", "never")
    ours, theirs, *_ = everybody(tmp_path, file_type=1)
    assert "EDGEPHI_PREPACKED" not in ours.environment() and "EDGEPHI_PREPACKED" not in theirs.environment()
    assert ours.environment()["EDGEPHI_CACHE"] == str(tmp_path / "cache-auto")


def test_a_folder_belongs_to_one_source(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    claim_folder(tmp_path / "made", first)
    claim_folder(tmp_path / "made", first)
    with pytest.raises(UsageError, match="made from another file"):
        claim_folder(tmp_path / "made", second)
