"""A lab's cells, states and resumption, with an executor that does as it is told."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgephi.benchmarks.bench.lab import plan
from edgephi.benchmarks.bench.lab.cluster import DaskExecutor
from edgephi.benchmarks.bench.lab.execute import Outcome
from edgephi.benchmarks.bench.lab.plan import Cell, Lab, Setting, read_lab
from edgephi.benchmarks.bench.lab.run import partial_file, read_states, run_lab, states_markdown
from edgephi.benchmarks.bench.results import Report
from edgephi.benchmarks.cluster.client import Job, place
from edgephi.errors import BundleError, OutputError, UsageError
from edgephi.lock import locked
from tests.bench_reports import case, report

LAB = Lab(bundles=("a", "b"), workloads=("quick",))
CELLS = [Cell(f"cell-{n}", Path(f"bundle{n}"), "quick", "cpu", Setting(), None) for n in range(4)]


def measured(rate: float, **changes: object) -> Report:
    return report(case("decode 8 at depth 0", "decode", {"decode_tokens_per_s": [rate, rate, rate]}), **changes)


class Simulated:
    """Answers with outcomes by the cell's name; an exception is raised instead."""

    def __init__(self, **outcomes: Outcome | BaseException) -> None:
        self.outcomes, self.begun = outcomes, list[str]()

    def run(self, cells: Sequence[Cell], begin: Callable[[Cell], float | None]) -> Iterator[tuple[Cell, Outcome]]:
        for cell in cells:
            begin(cell)
            self.begun.append(cell.name)
            outcome = self.outcomes.get(cell.name.replace("-", "_"), Outcome(measured(10)))
            if isinstance(outcome, BaseException):
                raise outcome
            yield cell, outcome


def states(output: Path) -> list[str]:
    return [one.state for one in read_states(output, CELLS)]


def test_every_cell_is_there_once_after_an_interruption_and_a_resumption(tmp_path: Path) -> None:
    partial_file(tmp_path, CELLS[2]).parent.mkdir(parents=True)
    partial_file(tmp_path, CELLS[2]).write_text(measured(5, stopped="the run did not end").model_dump_json())
    first = Simulated(cell_1=Outcome(None, "no such device"), cell_2=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_lab(LAB, CELLS, tmp_path, first)
    assert states(tmp_path) == ["done", "failed", "partial", "waiting"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "bundle1, quick, cpu: failed, no such device" in table
    assert "bundle2, quick, cpu: partial, the run did not end" in table

    second, said = Simulated(), list[str]()
    found = run_lab(LAB, CELLS, tmp_path, second, tell=said.append)
    assert second.begun == ["cell-1", "cell-2", "cell-3"] and said[0] == "1 of 4 cells were done before"
    assert [one.state for one in found] == ["done"] * 4
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == [cell.name for cell in CELLS]
    rows = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert [row["label"] for row in rows] == [cell.title for cell in CELLS]
    record = json.loads((tmp_path / "lab.json").read_text(encoding="utf-8"))
    assert [one["figures"]["decode"] for one in record["cells"]] == [10.0] * 4
    assert Simulated().begun == [] and run_lab(LAB, CELLS, tmp_path, Simulated()) == found


def test_a_crash_that_leaves_half_a_file_means_measuring_again(tmp_path: Path) -> None:
    run_lab(LAB, CELLS, tmp_path, Simulated())
    (tmp_path / "cells" / "cell-3" / "report.json").write_text('{"format"')
    partial_file(tmp_path, CELLS[0]).write_text("{")
    assert states(tmp_path) == ["done", "done", "done", "waiting"]
    assert [one.state for one in run_lab(LAB, CELLS, tmp_path, Simulated())] == ["done"] * 4


def test_what_was_known_before_the_end_does_not_replace_a_whole_report(tmp_path: Path) -> None:
    run_lab(LAB, CELLS, tmp_path, Simulated())
    partial_file(tmp_path, CELLS[0]).write_text(measured(5, stopped="the run did not end").model_dump_json())
    second = Simulated()
    assert [one.state for one in run_lab(LAB, CELLS, tmp_path, second)] == ["done"] * 4
    assert second.begun == [] and not partial_file(tmp_path, CELLS[0]).exists()


def test_a_second_command_does_not_measure_into_the_same_folder(tmp_path: Path) -> None:
    second = Simulated()
    with locked(tmp_path / "lab.lock"), pytest.raises(OutputError, match="measures into this folder"):
        run_lab(LAB, CELLS, tmp_path, second)
    assert second.begun == []
    run_lab(LAB, CELLS, tmp_path, second)
    assert not (tmp_path / "lab.lock").exists()


def test_a_reason_that_cannot_be_read_stops_no_lab(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "cell-1.failed.json").write_text("[" * 1000)
    assert states(tmp_path) == ["waiting", "failed", "waiting", "waiting"]
    assert [one.state for one in run_lab(LAB, CELLS, tmp_path, Simulated())] == ["done"] * 4


def test_the_time_budget_is_shared_and_the_rest_waits(tmp_path: Path) -> None:
    now, given = [0.0], list[float | None]()

    class Slow(Simulated):
        def run(self, cells: Sequence[Cell], begin: Callable[[Cell], float | None]) -> Iterator[tuple[Cell, Outcome]]:
            for cell in cells:
                given.append(begin(cell))
                now[0] += 40
                yield cell, Outcome(measured(1))

    lab = LAB.model_copy(update={"cell_seconds": 50.0})
    found = run_lab(lab, CELLS, tmp_path, Slow(), budget_s=100, clock=lambda: now[0])
    assert given == [50.0, 50.0, 20.0]
    assert [one.state for one in found] == ["done", "done", "done", "waiting"]


def test_noise_and_states_are_shown(tmp_path: Path) -> None:
    noisy = measured(3)
    noisy = noisy.model_copy(update={"cases": (noisy.cases[0].model_copy(update={"noisy": True}),)})
    stopped = measured(4, stopped="the time budget of 5 s was used up")
    said: list[str] = []
    found = run_lab(LAB, CELLS, tmp_path, Simulated(cell_0=Outcome(noisy), cell_1=Outcome(stopped)), tell=said.append)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in states_markdown(found).splitlines()[2:6]]
    assert [row[4:7] for row in rows] == [
        ["done", "noisy", "3"],
        ["partial", "quiet", "4"],
        ["done", "quiet", "10"],
        ["done", "quiet", "10"],
    ]
    assert any("done, 1 s, noisy: 1 of 1 cases" in words for words in said)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        run_lab(LAB, CELLS, tmp_path / "file" / "lab", Simulated())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bundles = []\nworkloads = ['quick']", "bundles"),
        ("bundles = ['a']", "workloads"),
        ("bundles = ['a']\nworkloads = ['quick']\nspeed = 1", "speed"),
        ("bundles = ['a', 'a']\nworkloads = ['quick']", "bundles has a name twice"),
        ("bundles = ['a']\nworkloads = ['nothing']", "no workload"),
        ("bundles = ['a']\nworkloads = [2026-01-01]", "not TOML that can be used"),
        ("bundles = [", "not TOML that can be used"),
        ("bundles = ['a']\nworkloads = ['quick']\n[[settings]]\nthreads = 0", "threads"),
    ],
)
def test_a_lab_that_cannot_be_used_is_refused_by_its_key(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "lab.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_lab(tmp_path / "lab.toml")


def test_bundles_are_folders_beside_the_file_or_installed_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "read_manifest", lambda folder: None)
    monkeypatch.setattr(plan, "bundle_facts", lambda folder, manifest: SimpleNamespace(sha256=folder.name))
    (tmp_path / "beside").mkdir()
    (tmp_path / "lab.toml").write_text("bundles = ['beside', 'phi', 'neither']\nworkloads = ['quick']")
    asked: list[str] = []

    def installed(name: str) -> Path | None:
        asked.append(name)
        return tmp_path / "store" / "phi" if name == "phi" else None

    _, cells = read_lab(tmp_path / "lab.toml", installed)
    assert [cell.bundle for cell in cells] == [tmp_path / "beside", tmp_path / "store" / "phi", tmp_path / "neither"]
    assert asked == ["phi", "neither"]


def test_devices_of_machines_have_names_and_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "read_manifest", lambda folder: None)
    monkeypatch.setattr(plan, "bundle_facts", lambda folder, manifest: SimpleNamespace(sha256="x"))
    lab = tmp_path / "lab.toml"
    lab.write_text(
        "bundles = ['a']\nworkloads = ['quick']\n"
        "devices = ['cpu', {name = 'desk', device = 'cpu', resource = 'r1'}, {name = 'board', resource = 'r2'}]"
    )
    _, cells = read_lab(lab)
    assert [cell.resource for cell in cells] == ["edgephi-cpu", "r1", "r2"]
    assert [cell.device for cell in cells] == ["cpu", "cpu", "auto"]
    assert [cell.device_name for cell in cells] == ["cpu", "desk", "board"]
    assert len({cell.name for cell in cells}) == 3 and cells[1].title == "a, quick, desk"
    lab.write_text(lab.read_text().replace("'r2'", "'r2 x'"))
    with pytest.raises(UsageError, match="resource"):
        read_lab(lab)


def test_a_cell_that_begins_again_keeps_its_number(tmp_path: Path) -> None:
    class Twice(Simulated):
        def run(self, cells: Sequence[Cell], begin: Callable[[Cell], float | None]) -> Iterator[tuple[Cell, Outcome]]:
            begin(cells[0])
            yield from super().run(cells, begin)

    said: list[str] = []
    run_lab(LAB, CELLS, tmp_path, Twice(), tell=said.append)
    assert [words.split()[0] for words in said if " of 4 " in words] == ["1", "1", "2", "3", "4"]


def test_without_dask_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    executor = DaskExecutor("tcp://desk:8786", lambda cell: Path(cell.name), lambda words: None)
    with pytest.raises(UsageError, match=r"\[cluster\]"):
        list(executor.run(CELLS, lambda cell: None))


def test_a_bundle_on_a_workers_machine_is_in_that_systems_words() -> None:
    def there(bundles: str | None) -> str:
        return place(bundles, Path("/models/phi"))

    assert there("D:\\models") == r"D:\models\phi" and there("/srv/models") == "/srv/models/phi"
    assert there(None) == str(Path("/models/phi"))


@pytest.mark.parametrize(
    "lists", ["bundles = ['a', './a']\nworkloads = ['quick']", "bundles = ['a']\nworkloads = ['w.toml', './w.toml']"]
)
def test_one_thing_named_in_two_ways_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: str) -> None:
    monkeypatch.setattr(plan, "read_manifest", lambda folder: None)
    monkeypatch.setattr(plan, "bundle_facts", lambda folder, manifest: SimpleNamespace(sha256="c"))
    (tmp_path / "a").mkdir()
    (tmp_path / "w.toml").write_text("description = 'x'\n[load]\n")
    (tmp_path / "lab.toml").write_text(lists)
    with pytest.raises(UsageError, match="two cells are the same: a, "):
        read_lab(tmp_path / "lab.toml")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, "no report of this version"),
        ({"report": "<b>"}, "no report of this version"),
        ({"report": {"format": 2}}, "no report of this version"),
        ({"report": measured(10, label="another").model_dump(mode="json")}, "the report of something else: another"),
        ({"reason": ["no", "text"]}, r"\['no', 'text'\]"),
    ],
)
def test_what_a_worker_sends_is_looked_at(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], words: str) -> None:
    executor = DaskExecutor("tcp://desk:8786", lambda cell: Path(cell.name), lambda words: None)
    monkeypatch.setattr(executor, "_hashes", {CELLS[0].bundle.resolve(): "b" * 64})
    job = Job("cell-0", "edgephi-cpu")
    monkeypatch.setattr(executor, "_cluster", SimpleNamespace(run=lambda *given: (one for one in [(job, answer)])))
    ((cell, outcome),) = executor.run(CELLS, lambda cell: None)
    assert cell == CELLS[0] and outcome.report is None and re.search(words, outcome.reason or "")
    answer = {"report": measured(10, label=cell.title).model_dump(mode="json")}
    ((cell, outcome),) = executor.run(CELLS, lambda cell: None)
    assert outcome.report is not None and outcome.reason is None


def test_a_missing_bundle_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text("bundles = ['a']\nworkloads = ['quick']")
    with pytest.raises(BundleError, match="no such bundle"):
        read_lab(tmp_path / "lab.toml")
    with pytest.raises(UsageError):
        read_lab(tmp_path / "missing.toml")
