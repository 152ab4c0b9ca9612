"""edgephi bench compare, history and schema: reading reports instead of making them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.options import Bundle, Json
from edgephi.errors import UsageError, printable, printable_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgephi.benchmarks.bench.comparison import Change, Comparison

Reported = Annotated[Path, typer.Argument(help="A report folder or its report.json.", show_default=False)]


def compare(
    first: Reported,
    second: Reported,
    fail_over: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT", help="Exit with status 1 when something is worse by more, as 5%.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two reports of the same workload: ratios with confidence, and what noise cannot explain.

    A figure is called worse (slower, or more memory or energy) or better when its repetitions differ beyond chance
    (Mann-Whitney test, adjusted for the number of figures, p below 0.05) and by more than the threshold: that of
    --fail-over, else 5 %. Figures of all cases of a group are judged together as well, which finds a common change with
    fewer repetitions.

    With --json, one object: threshold; differences (sentences on what else changed); unmatched (names of cases in one
    report only); groups and cases, lists of case, metric, first and second (medians), ratio (second over first), low
    and high (its confidence interval), confidence, p, adjusted_p, cost (ratio of time, memory or energy, above 1 is
    worse), verdict ("worse", "better", "no difference seen"); worse (how many are).
    """
    from edgephi.benchmarks.bench.comparison import THRESHOLD
    from edgephi.benchmarks.bench.comparison import compare as compared
    from edgephi.benchmarks.bench.results import read_report
    from edgephi.commands.console import print_json

    threshold = THRESHOLD if fail_over is None else _share(fail_over)
    found = compared(read_report(first), read_report(second), threshold)
    if as_json:
        print_json({"threshold": threshold, **_record(found)})
    else:
        _print(found, threshold)
    if fail_over is not None and found.worse():
        raise typer.Exit(1)


def history(folder: Bundle, as_json: Json = False) -> None:
    """Show every recorded run of a bundle on this machine, each compared with the one before it.

    The one before is the last of the same workload on the same execution provider.

    With --json, one object: file (the history), damaged (lines that could not be read), runs: a list of created,
    workload, versions, and change (null for the first of a workload, else what `edgephi bench compare --json` has).
    """
    from edgephi.benchmarks.bench.comparison import THRESHOLD
    from edgephi.benchmarks.bench.comparison import compare as compared
    from edgephi.benchmarks.bench.history import history_file, read_history
    from edgephi.benchmarks.bench.results import Machine
    from edgephi.benchmarks.bench.run import bundle_facts
    from edgephi.benchmarks.report import machine
    from edgephi.bundle import read_manifest
    from edgephi.commands.console import print_json

    found = read_history(bundle_facts(folder, read_manifest(folder)).sha256, Machine(**machine()))
    runs = []
    for index, report in enumerate(found.reports):
        asked = (report.workload.sha256, report.provider)
        same = [one for one in found.reports[:index] if (one.workload.sha256, one.provider) == asked]
        runs.append((report, compared(same[-1], report, THRESHOLD) if same else None))
    if as_json:
        record = {
            "file": str(history_file()),
            "damaged": found.damaged,
            "runs": [
                {
                    "created": report.created,
                    "workload": report.workload.name,
                    "versions": report.versions,
                    "change": _record(change) if change else None,
                }
                for report, change in runs
            ],
        }
        print_json(record)
        return
    from edgephi.commands.console import stdout

    lines = [f"{len(runs)} runs in {history_file()}"]
    lines += [f"{found.damaged} lines could not be read and were left out"] if found.damaged else []
    for report, change in runs:
        lines.append(f"{report.created}  {report.workload.name}: {_sentence(change)}")
        if change is not None and (change.worse() or change.differences):
            lines += [f"    {words}" for words in [*change.differences, *map(_change_words, change.worse())]]
    for line in lines:
        stdout().print(printable(line), soft_wrap=True)


def schema() -> None:
    """Print the JSON Schema of report.json."""
    from edgephi.benchmarks.bench.results import Report
    from edgephi.commands.console import print_json

    print_json(Report.model_json_schema(), indent=2)


def _share(percent: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", percent.strip())
    if match is None:
        raise UsageError(f"--fail-over is {percent!r}", remedy="Give a percentage, as 5%")
    return float(match[1]) / 100


def _record(found: Comparison) -> dict[str, object]:
    def rows(changes: Sequence[Change]) -> list[dict[str, object]]:
        return [
            {
                "case": change.case,
                "metric": change.metric,
                "first": change.first,
                "second": change.second,
                "ratio": change.shift.ratio,
                "low": change.shift.low,
                "high": change.shift.high,
                "confidence": change.shift.confidence,
                "p": change.shift.p,
                "adjusted_p": change.adjusted_p,
                "cost": change.cost,
                "verdict": change.verdict,
            }
            for change in changes
        ]

    return {
        "differences": list(found.differences),
        "unmatched": list(found.unmatched),
        "groups": rows(found.groups),
        "cases": rows(found.cases),
        "worse": len(found.worse()),
    }


def _print(found: Comparison, threshold: float) -> None:
    from edgephi.benchmarks.bench.table import LABELS, digits, in_unit
    from edgephi.benchmarks.report import markdown_table

    rows = []
    for change in (*found.groups, *found.cases):
        values = (digits(in_unit(change.metric, value)) for value in (change.first, change.second))
        one = change.shift
        interval = f"{one.low:.3f} to {one.high:.3f} ({100 * one.confidence:.0f} %)"
        rows.append((change.case, LABELS[change.metric], *values, f"{one.ratio:.3f}", interval, change.verdict))
    header = ("case", "figure", "first", "second", "ratio", "interval", "verdict")
    parts = [markdown_table(header, rows) if rows else "The reports have no case in common."]
    parts += [f"{len(found.worse())} figures are worse by more than {100 * threshold:g} %, beyond noise."]
    if found.differences:
        parts.append("What else changed:\n" + "\n".join(f"- {words}" for words in found.differences))
    if found.unmatched:
        parts.append("In one report only, or on another prompt: " + ", ".join(found.unmatched))
    typer.echo(printable_lines("\n\n".join(parts)))


def _sentence(change: Comparison | None) -> str:
    if change is None:
        return "first of its workload"
    count = len(change.worse())
    return f"{count} figures worse than the run before" if count else "nothing worse than the run before"


def _change_words(change: Change) -> str:
    return f"worse: {change.case}, {change.metric}, by {100 * (change.cost - 1):.1f} %"
