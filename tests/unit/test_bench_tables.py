"""Many reports in one table, in a history and in other programs' formats: simulated reports through the command."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgephi.benchmarks.bench.report.headline import headlines
from edgephi.benchmarks.bench.report.history import append
from edgephi.benchmarks.bench.report.league import read_reports
from edgephi.benchmarks.bench.report.rows import SQL_COLUMNS
from edgephi.benchmarks.bench.report.trend import Wanted, read_since, sparkline
from edgephi.benchmarks.bench.results import Machine, Report
from edgephi.benchmarks.report import machine
from edgephi.commands.app import app
from edgephi.errors import UsageError
from tests.bench_reports import case, report

RATES = (1.0, 1.005, 1.01, 1.015, 1.02, 1.025)


def speeds(rate: float, **changes: object) -> Report:
    """A report with a prompt, a decode and a load."""
    return report(
        case("load, warm", "load", {"load_s": [2 / rate * x for x in RATES]}, prompt_tokens=0),
        case("prefill 512", "prefill", {"prefill_tokens_per_s": [10 * rate * x for x in RATES]}, prompt_tokens=512),
        case(
            "decode 33 at depth 0",
            "decode",
            {"decode_tokens_per_s": [rate * x for x in RATES]},
            prompt_tokens=1,
            new_tokens=33,
        ),
        **changes,
    )


def saved(folder: Path, **reports: Report) -> list[Path]:
    paths = []
    for name, one in reports.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "report.json").write_text(one.model_dump_json(), encoding="utf-8")
        paths.append(folder / name)
    return paths


def command(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def test_more_than_two_reports_are_compared_with_the_first(tmp_path: Path) -> None:
    paths = saved(tmp_path, a=speeds(100), b=speeds(80), c=speeds(100, label="lab 3"))
    shown = command("bench", "compare", *paths, "--fail-over", "5%", status=1).stdout
    assert shown.startswith("first: a, 2026") and "\nthird: lab 3, 2026" in shown
    assert "second over first" in shown and "third over first" in shown
    found = json.loads(command("bench", "compare", *paths, "--json").stdout)
    assert {row["report"] for row in found["cases"] if row["verdict"] == "worse"} == {"b"}
    rows = list(csv.DictReader(io.StringIO(command("bench", "compare", *paths, "--csv").stdout)))
    decode = next(row for row in rows if row["report"] == "b" and row["metric"] == "decode_tokens_per_s")
    assert float(decode["ratio"]) == float(decode["second"]) / float(decode["first"]) == pytest.approx(0.8)
    assert {row["noisy"] for row in rows} == {"false"}
    with pytest.raises(UsageError, match="one report only"):
        command("bench", "compare", paths[0])
    with pytest.raises(UsageError, match="2 threads and 4 threads"):
        command("bench", "compare", *saved(tmp_path, d=speeds(1), e=speeds(1, threads=4)))


def test_a_table_puts_the_best_first_and_workloads_apart(tmp_path: Path) -> None:
    other = speeds(1).workload.model_copy(update={"name": "sweep", "sha256": "d" * 64})
    noisy = speeds(90)
    noisy = noisy.model_copy(update={"cases": (noisy.cases[0].model_copy(update={"noisy": True}), *noisy.cases[1:])})
    saved(
        tmp_path,
        slow=speeds(50),
        fast=speeds(100, stopped="the time budget"),
        noisy=noisy,
        gpu=speeds(70, provider="webgpu"),
        sweep=speeds(500, workload=other),
    )
    sections = json.loads(command("bench", "table", tmp_path, "--sort", "decode", "--json").stdout)
    assert [[row["name"] for row in section["reports"]] for section in sections] == [
        ["fast", "noisy", "gpu", "slow"],
        ["sweep"],
    ]
    by_load = json.loads(command("bench", "table", tmp_path, "--sort", "load", "--json").stdout)
    assert [row["name"] for row in by_load[0]["reports"]] == ["fast", "noisy", "gpu", "slow"]
    grouped = command("bench", "table", tmp_path, "--group-by", "provider").stdout
    assert "w, cpu (best decode first)" in grouped and "w, webgpu (best decode first)" in grouped
    assert "noisy: 1 of 3 cases" in grouped and "stopped: the time budget" in grouped
    assert "J/token" not in grouped and "score" not in grouped, "no report has these"
    with pytest.raises(UsageError, match="more than one output format"):
        command("bench", "table", tmp_path, "--csv", "--sql")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no report\.json"):
        command("bench", "table", tmp_path / "empty")


def test_every_report_has_a_name_of_its_own(tmp_path: Path) -> None:
    paths = saved(
        tmp_path, a=speeds(10, label="x"), b=speeds(20, label="x"), c=speeds(30, label="x (2)"), d=speeds(40, label="x")
    )
    named = read_reports(paths)
    assert [name for name, _ in named] == ["x", "x (2)", "x (2) (2)", "x (3)"]
    (section,) = json.loads(command("bench", "table", *paths, "--json").stdout)
    assert [one["figures"]["decode"] for one in section["reports"]] == [40.5, 30.375, 20.25, 10.125]


@pytest.mark.parametrize(
    "options",
    [["--label", "x" * 121], ["--label", "\udcff"], ["-t", "5000"], ["-t", "2,0"]],
    ids=["long", "bytes", "many", "none"],
)
def test_an_option_that_no_report_can_hold_is_refused_first(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=options[0]):
        command("bench", "run", tmp_path, *options)


def test_csv_has_every_figure_and_no_formula(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, a=speeds(100, label="=1+1"))
    rows = list(csv.DictReader(io.StringIO(command("bench", "table", path, "--csv").stdout)))
    assert [row["figure"] for row in rows] == ["load_s", "prefill_tokens_per_s", "decode_tokens_per_s"]
    assert {row["label"] for row in rows} == {"'=1+1"}
    assert float(rows[2]["median"]) == pytest.approx(101.25) and rows[2]["repetitions"] == "6"


def test_sql_fills_llama_benchs_table(tmp_path: Path) -> None:
    bundle = speeds(1).bundle.model_copy(update={"name": "it's'); DROP TABLE llama_bench; --\n.shell"})
    paths = saved(tmp_path, a=speeds(100, bundle=bundle), b=speeds(50))
    base = sqlite3.connect(":memory:")
    base.executescript(command("bench", "table", *paths, "--sql").stdout)
    columns = [row[1] for row in base.execute("PRAGMA table_info(llama_bench)")]
    assert columns == list(SQL_COLUMNS)
    rows = base.execute("SELECT model_filename, n_prompt, n_gen, avg_ts, avg_ns FROM llama_bench").fetchall()
    assert [row[1:3] for row in rows] == [(512, 0), (0, 33), (512, 0), (0, 33)]
    assert rows[0][0] == bundle.name.replace("\n", " ")
    assert rows[1][3] == pytest.approx(101.25)
    assert rows[1][4] == pytest.approx(sum(33e9 / (100 * x) for x in RATES) / 6, abs=1)


def test_headlines_need_all_answers() -> None:
    both = {"time_to_first_token_s": [1.0], "decode_tokens_per_s": [4.0]}
    answers = [case("a", "answer", both), case("b", "answer", both | {"decode_tokens_per_s": [16.0]})]
    assert headlines(report(*answers))["decode"] == pytest.approx(8)
    assert "decode" not in headlines(report(*answers, case("c", "answer", {}, state="not measured")))


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs of this machine, a fourth with another provider, and one of another machine."""
    path = tmp_path / "history.jsonl"
    monkeypatch.setenv("EDGEPHI_HISTORY", str(path))
    here = Machine(**machine())
    for day, rate in ((1, 100), (2, 90), (3, 95)):
        append(speeds(rate, created=f"2026-03-0{day}T00:00:00+00:00", machine=here, label="desk"))
    append(speeds(40, created="2026-03-04T00:00:00+00:00", machine=here, provider="webgpu"))
    append(speeds(7, created="2026-03-05T00:00:00+00:00"))
    return path


def test_a_history_shows_figures_and_how_they_moved(history: Path, tmp_path: Path) -> None:
    shown = command("bench", "history").stdout
    assert (
        "4 runs in" in shown
        and "decode, tokens/s" in shown
        and "worse: decode 33 at depth 0, decode_tokens_per_s, 10.0 % lower" in shown
    )
    assert "█▁▅  decode, tokens/s: 101 to 96.2 (last over first 0.950; tiny, w, cpu, 2 threads)" in shown
    runs = json.loads(command("bench", "history", "--json").stdout)["runs"]
    assert [round(run["figures"]["decode"], 3) for run in runs] == [101.25, 91.125, 96.188, 40.5]
    assert [run["change"] is None for run in runs] == [True, False, False, True]
    rows = list(csv.DictReader(io.StringIO(command("bench", "history", "--csv", "--device", "cpu").stdout)))
    assert len(rows) == 9 and {row["provider"] for row in rows} == {"cpu"}
    command("bench", "history", "--svg", tmp_path / "trend.svg")
    assert (tmp_path / "trend.svg").read_text(encoding="utf-8").count('class="name"') == 2  # lines in the legend
    with pytest.raises(UsageError, match="no run of this history has 'score'"):
        command("bench", "history", "--svg", tmp_path / "score.svg", "--figure", "score")


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--since", "2026-03-02"], 3),
        (["--since", "2026-03-02", "--device", "cpu"], 2),
        (["--label", "desk"], 3),
        (["--bundle", "tiny"], 4),
        (["--bundle", "bbbbbb"], 4),
        (["--bundle", "other"], 0),
        (["--workload", "sweep"], 0),
        (["--every-machine"], 5),
    ],
)
def test_a_history_is_filtered(history: Path, options: list[str], count: int) -> None:
    assert len(json.loads(command("bench", "history", *options, "--json").stdout)["runs"]) == count


def test_dates_and_bars() -> None:
    assert read_since("2026-03-31T18:00") == datetime.fromisoformat("2026-03-31T18:00+00:00")
    with pytest.raises(UsageError, match="--since"):
        read_since("yesterday")
    assert sparkline([1, 2, 8]) == "▁▂█" and sparkline([3, 3]) == "▄▄"
    assert Wanted(device="a").has(speeds(1)) and not Wanted(device="npu").has(speeds(1))
