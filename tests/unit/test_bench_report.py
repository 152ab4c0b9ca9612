"""What is written: whole or not at all, readable by people and programs, harmless whatever a name holds."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgephi.benchmarks.bench.report.charts import charts, picture
from edgephi.benchmarks.bench.report.history import append, machine_key, read_history
from edgephi.benchmarks.bench.report.output import as_json, check_report_folder, write_report
from edgephi.benchmarks.bench.report.page import page
from edgephi.benchmarks.bench.report.svg import Chart, Point, line_chart, nice_step, stacked
from edgephi.benchmarks.bench.report.table import cautions, cell, digits, is_outlier, markdown, with_spread
from edgephi.benchmarks.bench.results import Report, figure, read_report
from edgephi.errors import BundleError, OutputError
from tests.bench_reports import case, everything, report

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<script>alert(1)</script> | [red]x[/red]\n# y"


def full() -> Report:
    made = report(
        case("prefill 8", "prefill", {"prefill_tokens_per_s": [100, 110, 120]}, prompt_tokens=8),
        case("prefill 64", "prefill", {"prefill_tokens_per_s": [200, 210, 260]}, prompt_tokens=64),
        case(EVIL, "answer", {"time_to_first_token_s": [0.1, 0.2]}),
        case("d", "decode", {}, state="wrong answers", reason="1 of 3 runs gave other tokens than the first"),
    )
    return made.model_copy(update={"bundle": made.bundle.model_copy(update={"name": EVIL})})


def drawn(chart: Chart) -> ET.Element:
    return ET.fromstring(stacked("heading", [chart]))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "href"), (tag, name, value)


def test_names_from_strangers_stay_text() -> None:
    tags = Tags()
    tags.feed(page(full()))
    assert not {"script", "red"} & set(tags.seen) and {"table", "svg", "dl"} <= set(tags.seen)
    machine = Tags()
    machine.feed(page(everything("<img src=x onerror=alert(1)>")))
    assert not {"script", "img", "link", "a"} & set(machine.seen)
    lines = markdown(full()).splitlines()
    assert not any(line.startswith("#") for line in lines)
    table = [line for line in lines if "alert(1)" in line and line.startswith("|")]
    assert [line.count("|") for line in table] == [3]  # a column for its name, and one for the only figure


def test_a_name_does_not_turn_what_follows_it() -> None:
    shown = page(everything("tiny\u202e\x1b[31m"))
    assert not any(character in shown for character in "\u202e\x1b") and "tiny\\u202e" in shown


def test_what_was_not_measured_says_so_and_why() -> None:
    text = markdown(full())
    assert "not measured" in text and "not measured (there is no meter)" in text
    assert "d: wrong answers, 1 of 3 runs" in text
    row = next(line for line in text.splitlines() if line.startswith("| d "))
    assert "Not measured in any case, and left out: " in text and "J/token" in text and "| J/token" not in text
    assert "wrong answers" in row and not any(letter.isdigit() for letter in row)


def test_figures_are_written_in_their_unit_with_their_spread() -> None:
    assert cell("time_to_first_token_s", figure([0.1, 0.11, 0.12, 0.13, 0.14])) == "120 ± 10"
    assert cell("prefill_tokens_per_s", figure([1234.5])) == "1,234"
    assert cell("peak_private_bytes", figure([2_500_000])) == "2.5"
    assert cell("cpu_share", figure([1 - 1e-12, 1.0, 1 + 1e-12])) == "100.0 ± 0"
    assert cell("cpu_share", None) == "not measured"
    assert [digits(value) for value in (0.01234, 1.234, 99.94, 12345.6)] == ["0.0123", "1.23", "99.9", "12,346"]


@pytest.mark.parametrize(
    ("value", "spread", "shown"),
    [
        (1319.4, 161, ("1,320", "160")),
        (13764, 460, ("13,800", "500")),
        (219.3, 3.6, ("219", "4")),
        (4.4, 0.049, ("4.40", "0.05")),
        (100, 2.1e-10, ("100.0", "0")),
        (195.04, 0.022, ("195.0", "0")),
        (0.1361, 0.0009, ("0.1361", "0.0009")),
        (5, 30, ("5", "30")),
        (0, 0.25, ("0", "0.25")),
        (9.96, 0.096, ("9.96", "0.10")),
        (0, 0, ("0", "0")),
    ],
)
def test_noise_decides_how_many_digits_are_shown(value: float, spread: float, shown: tuple[str, str]) -> None:
    assert with_spread(value, spread) == shown


def test_a_ceiling_far_above_its_quartiles_is_called_an_outlier() -> None:
    assert is_outlier(figure([489, 489, 501, 649, 649, 1740]))
    assert not is_outlier(figure([44.9, 46, 47.4, 48.6])) and not is_outlier(figure([5, 5, 5]))
    said = cautions(everything())
    assert [words.partition(":")[0] for words in said] == [
        "Noisy",
        "Stopped",
        "The best reading of the int8 peak is an outlier",
    ]
    assert all(words in markdown(everything()) for words in said)
    assert "an outlier, quartiles" in markdown(everything())
    assert cautions(report(case("d", "decode", {"decode_tokens_per_s": [1, 2]}))) == []


def test_a_tile_has_its_noise_its_case_and_its_share() -> None:
    text = page(everything())
    assert "<strong>220.4 <small>tokens/s</small></strong><span>± 1.4 · decode 32 at depth 0</span>" in text
    assert "<span>49 % of the memory bandwidth</span><em>noisy</em>" in text
    assert "% of the int8 peak, an outlier</span>" in text
    assert text.count('<li class=noisy><span class="name">') == 2


def test_a_chart_puts_points_where_they_belong() -> None:
    points = [Point(16, 50, 40, 60), Point(64, 100, 90, 100), Point(1024, 0, 0, 0)]
    root = drawn(line_chart("a < b", "x", "y", [("", points)], log_x=True))
    dots = list(root.iter(f"{SVG}circle"))
    across = [float(dot.get("cx", "").rstrip("%")) for dot in dots]
    down = [float(dot.get("cy", "")) for dot in dots]
    assert (across[1] - across[0]) / (across[2] - across[0]) == pytest.approx(2 / 6, abs=0.01)  # powers of two
    assert (down[2] - down[0]) / (down[2] - down[1]) == pytest.approx(0.5, abs=0.01)
    pieces = [line for line in root.iter(f"{SVG}line") if "through" in line.get("class", "")]
    assert [(line.get("x1"), line.get("x2")) for line in pieces] == [
        (dots[0].get("cx"), dots[1].get("cx")),
        (dots[1].get("cx"), dots[2].get("cx")),
    ]
    assert {text.text for text in root.iter(f"{SVG}text")} >= {"a < b, y", "0", "100", "16", "1,024"}


def test_a_chart_of_one_point_or_of_zeros_is_still_a_chart() -> None:
    for point in (Point(1, 5, 5, 5), Point(0, 0, 0, 0)):
        drawn(line_chart("t", "x", "y", [("a", [point]), ("b", [])]))


def test_what_a_token_costs_is_drawn_in_milliseconds() -> None:
    rates = {0: [100, 125, 200], 1000: [50, 50, 50], 3000: [20, 25, 40]}
    cases = [case(f"d{depth}", "decode", {"decode_tokens_per_s": rate}, depth=depth) for depth, rate in rates.items()]
    (chart,) = [chart for chart in charts(report(*cases)) if chart.unit == "ms a token"]
    root = drawn(chart)
    assert [dot.findtext(f"{SVG}title") for dot in root.iter(f"{SVG}circle")] == ["8", "20", "40"]
    quartiles = [line for line in root.iter(f"{SVG}line") if line.get("class", "").startswith("bar")]
    upper, lower = float(quartiles[0].get("y2", "")), float(quartiles[0].get("y1", ""))
    assert upper < lower, "the quartiles of a rate change places"


def test_the_clock_is_drawn_over_whole_seconds() -> None:
    (clock,) = [chart for chart in charts(everything()) if chart.title == "Clock"]
    labels = [one.text or "" for one in drawn(clock).iter(f"{SVG}text")]
    assert {"0", "50", "110", "seconds"} <= set(labels) and not any("." in label for label in labels)


def test_the_picture_is_all_charts_in_one_file() -> None:
    assert picture(report(case("d", "decode", {}))) is None
    text = picture(full())
    assert text is not None
    assert len(ET.fromstring(text).findall(f"{SVG}g")) == len(list(charts(full()))) == 1
    assert "<script" not in text and "href" not in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(("rough", "step"), [(0.03, 0.05), (1, 1), (1.1, 2), (208, 250), (7, 10), (420, 500), (0, 1)])
def test_steps_are_round_numbers(rough: float, step: float) -> None:
    assert nice_step(rough) == pytest.approx(step)


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_report(tmp_path / "r", full(), force=False)
    assert read_report(tmp_path / "r") == read_report(tmp_path / "r" / "report.json") == full()
    names = {"report.json", "report.md", "report.html", "report.svg"}
    assert {path.name for path in (tmp_path / "r").iterdir()} == names
    write_report(tmp_path / "r", report(), force=True)
    assert read_report(tmp_path / "r") == report()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_report_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path / "r", full(), force=False)
    original = Path.write_text

    def full_disk(self: Path, text: str, **named: str) -> int:
        if self.suffix == ".html":
            raise OSError(28, "No space left on device")
        return original(self, text, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full_disk)
    for name, force in (("r", True), ("new", False)):
        with pytest.raises(OutputError, match="No space left"):
            write_report(tmp_path / name, report(), force=force)
    assert read_report(tmp_path / "r") == full()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_only_reports_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(OutputError, match="exists"):
        check_report_folder(tmp_path, force=False)
    check_report_folder(tmp_path, force=True)
    (tmp_path / "thesis.docx").write_text("")
    with pytest.raises(OutputError, match="no report"):
        check_report_folder(tmp_path, force=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 2}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"seconds": float("nan")}, "seconds"),
        ({"cases": [{"name": "x"}]}, "cases.0"),
    ],
)
def test_a_report_of_another_form_is_refused(change: dict[str, object], named: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(as_json(full())) | change))
    with pytest.raises(BundleError, match=named):
        read_report(path)
    with pytest.raises(BundleError, match="edgephi bench"):
        read_report(tmp_path / "missing.json")


def _changed(place: str, value: object) -> str:
    """The document of a report, a number in it changed."""
    document = json.loads(as_json(full()))
    *keys, last = place.split(".")
    inner = document
    for key in keys:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("created", "yesterday"),
        ("workload.pause_s", 10**400),
        ("bundle.stored_bytes", 10**400),
        ("cases.0.depth", 10**400),
        ("cases.0.prompt_tokens", -1),
        ("cases.0.figures.prefill_tokens_per_s.median", 0),
        ("cases.0.figures.prefill_tokens_per_s.high", 1e308),
        ("cases.0.figures.prefill_tokens_per_s.values", [5e-324, 110, 1e308]),
        ("cases.0.figures.prefill_tokens_per_s.values", [0.0, 130.0]),
    ],
)
def test_numbers_that_nobody_measured_are_refused(place: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(_changed(place, value))
    with pytest.raises(BundleError, match=re.escape(place.split(".figures")[0])):
        read_report(path)


def test_a_prompt_of_no_tokens_has_no_place_on_the_axis() -> None:
    prompts = [case(f"p{n}", "prefill", {"prefill_tokens_per_s": [10.0]}, prompt_tokens=n) for n in (0, 8, 16)]
    assert [chart.title for chart in charts(report(*prompts))] == ["Prefill"]


def test_a_picture_is_a_document_whatever_the_names_hold() -> None:
    drawn = picture(everything("\x1b[31m<b>\x00\x0c"))
    assert drawn is not None and "x1b[31m" in "".join(ET.fromstring(drawn).itertext())


def test_history_is_of_one_bundle_on_one_machine_and_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "history.jsonl"
    mine = report()
    later = mine.model_copy(update={"created": "2027-01-01T00:00:00+00:00", "versions": {"onnxruntime": "2"}})
    other_bundle = mine.model_copy(update={"bundle": mine.bundle.model_copy(update={"sha256": "d" * 64})})
    other_machine = mine.model_copy(update={"machine": mine.machine.model_copy(update={"cpu": "B"})})
    updated = mine.machine.model_copy(update={"system": "Linux 99", "python": "4"})
    assert machine_key(updated) == machine_key(mine.machine), "an update is what history is for"
    append(later, path)
    append(other_bundle, path)
    with path.open("a") as stream:
        stream.write('{"format": 1, "edge')  # the power went
    append(other_machine, path)
    append(mine, path)
    found = read_history(mine.bundle.sha256, updated, path)
    assert found.reports == (mine, later)
    assert found.damaged == 1


def test_no_history_is_an_empty_one(tmp_path: Path) -> None:
    assert read_history("x", report().machine, tmp_path / "none").reports == ()
    with pytest.raises(OutputError, match="EDGEPHI_HISTORY"):
        append(report(), tmp_path)
