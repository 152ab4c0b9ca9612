"""`edgephi bench` as a person meets it, on a tiny bundle with a tiny workload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import edgephi
from edgephi.benchmarks.bench.report.charts import charts
from edgephi.benchmarks.bench.results import Report, read_report
from edgephi.benchmarks.bench.workload import read_workload
from edgephi.benchmarks.evaluate.golden import golden_answers
from edgephi.commands.app import app
from edgephi.errors import BundleError, EdgephiError, OutputError, QualityError, UsageError
from edgephi.runtime.loading import load
from tests.end_to_end.test_export import TOKENIZER, added_token

WORKLOAD = """
description = "Tiny."

[method]
repetitions = 4
others_cpu_limit = 1.0

[[prefill]]
text = "text.txt"
lengths = [4, 8, 100000]

[[decode]]
text = "text.txt"
tokens = 5
depths = [0, 10]

[[answer]]
name = "question"
category = "question"
instruction = "why is the sea salty"
max_new_tokens = 6
stop = false

[score]
ttft_numerator = 1250
rate_of_5000 = 244

[[speculation]]
name = "free"
instruction = "abc abc abc abc"
tokens = 6
"""


def command(*arguments: object, status: int = 0) -> Result:
    """Run the command; errors come as exceptions, as they reach `main`."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def bundle(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle whose tokenizer knows the letters a to z."""
    folder = Path(shutil.copytree(fixtures / "llama-tied", tmp_path_factory.mktemp("tiny") / "checkpoint"))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"added_tokens": [added_token(26, "</s>")]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}))
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 26, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    edgephi.export(folder, folder.parent / "bundle")
    return folder.parent / "bundle"


@pytest.fixture(autouse=True)
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "data" / "history.jsonl"
    monkeypatch.setenv("EDGEPHI_HISTORY", str(path))
    return path


LOAD = """
[load]
cold = true
repetitions = 2
"""


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the sea is salt and the rain is not")
    (tmp_path / "tiny.toml").write_text(WORKLOAD)
    return tmp_path / "tiny.toml"


def test_a_workload_becomes_a_report_a_page_and_a_line_of_history(
    bundle: Path, workload: Path, tmp_path: Path, history: Path
) -> None:
    output = tmp_path / "report"
    workload.write_text(WORKLOAD + LOAD)
    shown = command("bench", bundle, "--workload", workload, "--output", output).stdout
    report = read_report(output)
    names = {"report.json", "report.html", "report.md", "report.svg"}
    assert {path.name for path in output.iterdir()} == names
    assert report.roofline is not None and report.spinning is not None
    assert all("bandwidth_share" in case.figures for case in report.cases if case.group == "decode" and case.figures)
    assert (output / "report.md").read_text(encoding="utf-8") == shown
    cases = {case.name: case for case in report.cases}

    assert cases["prefill 100000"].state == "not measured"
    assert "100,001 tokens of context" in str(cases["prefill 100000"].reason)
    assert "prefill 100000: not measured" in shown

    measured = [case for case in report.cases if case.state == "measured"]
    for case in measured:
        count = 2 if case.group == "load" else 4
        assert all(len(found.values) == count for found in case.figures.values()), case.name
    assert cases["decode 5 at depth 10"].depth == 10
    assert cases["decode 5 at depth 10"].new_tokens == 5
    assert (
        not any("energy" in metric for case in measured for metric in case.figures) or report.conditions.energy.source
    )
    assert cases["load, warm"].figures["peak_private_bytes"].median > 5e6
    assert cases["load, cold"].state == "measured" or cases["load, cold"].reason
    assert {one.name for one in report.derived} >= {
        "Procyon-style score",
        "decode speed kept at depth 10",
        "speculation, free",
    }
    assert (report.provider, report.providers) == ("cpu", ("CPUExecutionProvider",))
    assert report.quality.contract == "not recorded"
    assert str(bundle.parent) not in (output / "report.json").read_text(encoding="utf-8"), "a path of this machine"

    html = (output / "report.html").read_text(encoding="utf-8")
    titles = [chart.title for chart in charts(report)]  # on some machines also the temperature and the clock
    assert {"Prefill", "Decode at depth"} <= set(titles) and html.count("<svg") == len(titles)
    assert "<script" not in html and "http" not in html.replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", ""
    )

    assert len(history.read_text(encoding="utf-8").splitlines()) == 1
    assert Report.model_validate_json(history.read_text(encoding="utf-8")) == report


def test_json_is_the_report_and_answers_do_not_depend_on_the_run(bundle: Path, workload: Path) -> None:
    one, two = (
        Report.model_validate_json(command("bench", bundle, "--workload", workload, "--json", "--no-record").stdout)
        for _ in range(2)
    )
    assert [case.tokens_sha256 for case in one.cases] == [case.tokens_sha256 for case in two.cases]
    assert one.bundle == two.bundle and one.workload == two.workload


def with_rates(document: dict[str, Any], rate: float, **changes: object) -> dict[str, Any]:
    """A report whose prefill and decode figures are four repetitions about a rate: what was timed here is noise."""
    changed: dict[str, Any] = json.loads(json.dumps(document)) | changes
    values = [rate * factor for factor in (1.0, 1.01, 1.02, 1.03)]
    for case in changed["cases"]:
        for name in case["figures"]:
            if name.endswith("tokens_per_s"):
                case["figures"][name] = {"values": values, "median": values[1], "low": values[0], "high": values[3]}
    return changed


def test_a_report_is_compared_with_a_slower_one_and_seen_in_the_history(
    bundle: Path, workload: Path, tmp_path: Path, history: Path
) -> None:
    measured = json.loads(command("bench", bundle, "--workload", workload, "--json").stdout)
    later = {"created": "2999-01-01T00:00:00+00:00", "versions": measured["versions"] | {"onnxruntime": "9.9"}}
    documents = with_rates(measured, 100), with_rates(measured, 90, **later)
    first, slower = tmp_path / "first.json", tmp_path / "slower.json"
    for path, document in zip((first, slower), documents, strict=True):
        path.write_text(json.dumps(document), encoding="utf-8")

    assert "0 figures are worse" in command("bench", "compare", first, first, "--fail-over", "5%").stdout
    shown = command("bench", "compare", first, slower, "--fail-over", "5%", status=1).stdout
    here = measured["versions"]["onnxruntime"]
    assert "all 2 cases of prefill" in shown and f"onnxruntime: {here} → 9.9" in shown
    command("bench", "compare", first, slower, "--fail-over", "20%")
    found = json.loads(command("bench", "compare", first, slower, "--json").stdout)
    worse = [row for row in found["groups"] if row["verdict"] == "worse"]
    assert {row["case"] for row in worse} == {
        f"all 2 cases of {group}" for group in ("prefill", "decode", "speculation")
    }
    assert all(row["cost"] == pytest.approx(1 / 0.9) for row in worse)

    history.write_text("".join(json.dumps(document) + "\n" for document in documents) + "{torn", encoding="utf-8")
    seen = json.loads(command("bench", "history", bundle, "--json").stdout)
    assert seen["damaged"] == 1
    assert [run["change"] and run["change"]["worse"] for run in seen["runs"]] == [None, found["worse"]]
    assert (
        "worse: all 2 cases of prefill, prefill_tokens_per_s, 10.0 % lower"
        in command("bench", "history", bundle).stdout
    )


def test_a_broken_contract_is_not_timed(bundle: Path, workload: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    with load(copy) as model:
        (golden,) = golden_answers(model, ["abc"], 4)
    manifest = json.loads((copy / "edgephi.json").read_text(encoding="utf-8"))
    answer = golden.model_dump(mode="json")
    manifest["quality"] = {
        "text": {"name": "t", "sha256": "0" * 64, "windows": 1, "window_length": 2},
        "perplexity": 2.0,
        "against": None,
        "against_perplexity": None,
        "kl_mean": None,
        "kl_p99": None,
        "top1_agreement": None,
        "providers": ["CPUExecutionProvider"],
        "versions": {},
        "golden": [answer],
    }
    (copy / "edgephi.json").write_text(json.dumps(manifest), encoding="utf-8")
    report = json.loads(command("bench", copy, "--workload", workload, "--json").stdout)
    assert report["quality"] == {"contract": "held", "golden_tokens": 4, "near_ties": 0}

    answer["token_ids"][2] = (answer["token_ids"][2] + 1) % 26
    answer["margins"][2] = 9.0
    (copy / "edgephi.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(QualityError, match="token 3, so the speed"):
        command("bench", copy, "--workload", workload, "--output", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_measured_is_refused_before_any_work(bundle: Path, workload: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgephiError, match="only for cpu"):
        command("bench", bundle, "--workload", workload, "--device", "gpu")
    with pytest.raises(EdgephiError, match="tpu"):
        command("bench", bundle, "--workload", workload, "--device", "tpu")
    with pytest.raises(UsageError, match=r"no workload 'nothing'.*quick"):
        command("bench", bundle, "--workload", "nothing")
    with pytest.raises(UsageError, match="--fail-over"):
        command("bench", "compare", bundle, bundle, "--fail-over", "much")
    with pytest.raises(BundleError, match="no such bundle"):
        command("bench", tmp_path / "missing")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    for force in ((), ("--force",)):
        with pytest.raises(OutputError):
            command("bench", bundle, "--workload", workload, "--output", tmp_path / "photos", *force)


def test_the_schema_describes_what_is_printed() -> None:
    schema = json.loads(command("bench", "schema").stdout)
    assert set(schema["required"]) >= {"cases", "conditions", "machine"}
    assert command("bench", "--help").stdout.count("compare") >= 1


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits are not measured, which takes seconds."""
    from edgephi.benchmarks.bench import run as running

    monkeypatch.setattr(running, "_readings", lambda *arguments: None)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch, no_limits: None) -> Callable[[int, BaseException], None]:
    """Makes the n-th run of a case raise."""
    from edgephi.benchmarks.bench import run as running
    from edgephi.benchmarks.bench.cases import Case
    from edgephi.benchmarks.bench.measure import Sample, measure

    def stop(number: int, error: BaseException) -> None:
        calls = 0

        def stopped(*arguments: Any) -> Sample:
            nonlocal calls
            calls += 1
            if calls == number:
                raise error
            assert isinstance(arguments[1], Case)
            return measure(*arguments)

        monkeypatch.setattr(running, "measure", stopped)

    return stop


SIX = """
description = "Six cases."
[method]
warmups = 1
repetitions = 3
others_cpu_limit = 1.0
[[prefill]]
text = "text.txt"
lengths = [1, 2, 3, 4, 5, 6]
"""
LISTS = ("-p", "4,8", "-n", "3", "-d", "0,6", "--repetitions", "3", "--label", "desk")


def test_an_interrupted_run_keeps_what_was_measured(
    bundle: Path, tmp_path: Path, history: Path, stopping: Callable[[int, BaseException], None]
) -> None:
    stopping(6 + 6 + 3, KeyboardInterrupt())  # in the second round
    shown = command("bench", bundle, *LISTS, "--output", tmp_path / "r", status=130).stdout
    assert "- stopped: interrupted: cases or repetitions are missing" in shown
    report = read_report(tmp_path / "r")
    counts = [len(case.figures["cpu_share"].values) for case in report.cases]
    assert sorted(counts) == [1, 1, 1, 1, 2, 2]
    assert report.stopped == "interrupted" and report.label == "desk" and report.workload.name == "lists"
    assert not history.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["r"]


def test_an_interruption_before_the_first_round_names_the_cases_without_figures(
    bundle: Path, tmp_path: Path, stopping: Callable[[int, BaseException], None]
) -> None:
    stopping(2, KeyboardInterrupt())
    command("bench", bundle, *LISTS, "--output", tmp_path / "r", status=130)
    found = read_report(tmp_path / "r").cases
    assert {(case.state, case.reason) for case in found} == {("not measured", "the run stopped before it")}


def test_a_crash_leaves_what_was_known(
    bundle: Path, tmp_path: Path, stopping: Callable[[int, BaseException], None]
) -> None:
    stopping(6 + 6 + 1, RuntimeError("the machine went away"))
    with pytest.raises(RuntimeError):
        command("bench", bundle, *LISTS, "--output", tmp_path / "r")
    report = read_report(tmp_path / "r.partial.json")
    assert report.stopped == "the run did not end"
    assert all(len(case.figures["cpu_share"].values) == 1 for case in report.cases)
    assert "stopped: the run did not end" in command("bench", "table", tmp_path / "r.partial.json").stdout


def test_a_crash_in_a_long_round_leaves_its_runs_too(
    bundle: Path, tmp_path: Path, stopping: Callable[[int, BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgephi.benchmarks.bench import run as running

    monkeypatch.setattr(running, "KEEP_S", 0.0)
    stopping(6 + 6 + 3, RuntimeError("the machine went away"))  # in the second round
    with pytest.raises(RuntimeError):
        command("bench", bundle, *LISTS, "--output", tmp_path / "r")
    cases = read_report(tmp_path / "r.partial.json").cases
    assert sorted(len(case.figures["cpu_share"].values) for case in cases) == [1, 1, 1, 1, 2, 2]


def test_a_cell_that_ctrl_c_reaches_keeps_the_round_in_progress(
    bundle: Path, tmp_path: Path, stopping: Callable[[int, BaseException], None]
) -> None:
    from edgephi.benchmarks.bench.lab.execute import measure

    stopping(6 + 6 + 3, KeyboardInterrupt())
    partial = tmp_path / "cell.partial.json"
    (tmp_path / "six.toml").write_text(SIX)
    (tmp_path / "text.txt").write_text("a text of some words")
    with pytest.raises(KeyboardInterrupt):
        measure(str(bundle), str(tmp_path / "six.toml"), "cpu", None, None, None, None, "a cell", str(partial))
    cases = read_report(partial).cases
    assert sorted(len(case.figures["cpu_share"].values) for case in cases) == [1, 1, 1, 1, 2, 2]


def test_a_time_budget_ends_a_run_and_value_lists_make_a_report_for_each_count_of_threads(
    bundle: Path, tmp_path: Path, no_limits: None
) -> None:
    shown = command("bench", bundle, *LISTS, "-t", "1,2", "--output", tmp_path / "r").stdout
    assert shown.count("decode 3 at depth 6") == 2
    one, two = (read_report(tmp_path / "r" / f"threads-{count}") for count in (1, 2))
    assert (one.threads, two.threads, one.workload.repetitions) == (1, 2, 3)
    assert [case.name for case in one.cases if case.group == "prefill"] == [
        "prefill 4",
        "prefill 8",
        "prefill 4 at depth 6",
        "prefill 8 at depth 6",
    ]
    with pytest.raises(UsageError, match="1 threads and 2 threads"):
        command("bench", "compare", tmp_path / "r")
    stopped = json.loads(command("bench", bundle, *LISTS, "--time-budget", "0.000001s", "--json").stdout)
    assert "time budget" in stopped["stopped"] and stopped["cases"][0]["state"] == "not measured"
    for wrong in (("-p", "a"), ("-p", "0"), ("--time-budget", "soon"), ("-p", "4", "--workload", "quick")):
        with pytest.raises(UsageError):
            command("bench", bundle, *wrong)


def test_the_list_of_workloads_says_what_they_ask_and_where_the_minutes_come_from(bundle: Path, history: Path) -> None:
    assert "A minute or two" in command("bench", "list").stdout
    asked = {one["name"]: one for one in json.loads(command("bench", "list", bundle, "--json").stdout)}
    assert asked["quick"]["loads"] == 17 and asked["quick"]["measured"] is None and asked["quick"]["seconds"] > 0
    assert asked["growth"]["refused"] > 0
    report = json.loads(command("bench", bundle, *LISTS, "--json").stdout)
    report["workload"]["sha256"] = read_workload("sweep").sha256
    report |= {"seconds": 120.0, "created": "2026-03-01T00:00:00+00:00"}
    history.write_text(json.dumps(report) + "\n", encoding="utf-8")
    shown = command("bench", "list", bundle).stdout
    (sweep,) = [line for line in shown.splitlines() if line.startswith("| sweep")]
    assert "2.0 | measured 2026-03-01" in sweep and "estimated from a quick measurement" in shown
