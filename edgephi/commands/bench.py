"""edgephi bench: how fast a bundle is on this machine, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from edgephi.commands.options import Bundle, Device, Json
from edgephi.errors import UsageError, printable

if TYPE_CHECKING:
    from edgephi.benchmarks.bench.report.comparison import Change, Comparison


class _BenchGroup(TyperGroup):
    """`edgephi bench DIR` means `edgephi bench run DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_BenchGroup,
    help="Measure a bundle on this machine, compare two reports, and watch figures over time. "
    "`edgephi bench DIR` is short for `edgephi bench run DIR`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Reported = Annotated[Path, typer.Argument(help="A report folder or its report.json.", show_default=False)]


@app.command("compare")
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
    from edgephi.benchmarks.bench.report.comparison import THRESHOLD
    from edgephi.benchmarks.bench.report.comparison import compare as compared
    from edgephi.benchmarks.bench.report.table import comparison_markdown
    from edgephi.benchmarks.bench.results import read_report
    from edgephi.commands.console import print_json
    from edgephi.commands.tables import print_markdown

    threshold = THRESHOLD if fail_over is None else _share(fail_over)
    found = compared(read_report(first), read_report(second), threshold)
    if as_json:
        print_json({"threshold": threshold, **found.as_json()})
    else:
        print_markdown(comparison_markdown(found, threshold))
    if fail_over is not None and found.worse():
        raise typer.Exit(1)


@app.command("history")
def history(folder: Bundle, as_json: Json = False) -> None:
    """Show every recorded run of a bundle on this machine, each compared with the one before it.

    The one before is the last of the same workload on the same execution provider.

    With --json, one object: file (the history), damaged (lines that could not be read), runs: a list of created,
    workload, versions, and change (null for the first of a workload, else what `edgephi bench compare --json` has).
    """
    from edgephi.benchmarks.bench.report.comparison import with_changes
    from edgephi.benchmarks.bench.report.history import history_file, read_history
    from edgephi.benchmarks.bench.results import Machine
    from edgephi.benchmarks.bench.run import bundle_facts
    from edgephi.benchmarks.report import machine
    from edgephi.bundle import read_manifest
    from edgephi.commands.console import print_json

    found = read_history(bundle_facts(folder, read_manifest(folder)).sha256, Machine(**machine()))
    runs = with_changes(found.reports)
    if as_json:
        record = {
            "file": str(history_file()),
            "damaged": found.damaged,
            "runs": [
                {
                    "created": report.created,
                    "workload": report.workload.name,
                    "versions": report.versions,
                    "change": change.as_json() if change else None,
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


@app.command("schema")
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


def _sentence(change: Comparison | None) -> str:
    if change is None:
        return "first of its workload"
    count = len(change.worse())
    return f"{count} figures worse than the run before" if count else "nothing worse than the run before"


def _change_words(change: Change) -> str:
    return f"worse: {change.case}, {change.metric}, by {100 * (change.cost - 1):.1f} %"


@app.command("run")
def run(
    folder: Bundle,
    workload: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help="A built-in workload, or a TOML file of your own."),
    ] = "quick",
    device: Device = "auto",
    spinning: Annotated[
        bool | None,
        typer.Option(
            "--spinning/--no-spinning",
            help="Whether idle CPU threads wait actively; by default as the device profile and the power mode say.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="REPORT", help="Folder for report.json, .html, .md and .svg.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report that is there.")] = False,
    record: Annotated[bool, typer.Option(help="Keep the figures for `edgephi bench history`.")] = True,
    as_json: Json = False,
) -> None:
    """Run a workload on a bundle and print what was measured as a Markdown table.

    Workloads: quick (a minute or two for a small model), sweep, growth, mlperf-client, procyon-style, load,
    long-context, speculation, or a file. Cases that do not fit the model's context are listed with the reason. A case
    whose greedy tokens differ between repetitions has no figures; a bundle that breaks its recorded quality contract is
    not measured at all, nor is one that does not run on the --device. What this machine does not meter is "not
    measured".

    Energy, where a meter exists, has the idle power of the machine subtracted. Shares of the processors are of all of
    them. Percentiles between tokens are of each repetition. A repetition during which other processes were busy is
    done again, a bounded number of times.

    With --json, the document of report.json; `edgephi bench schema` prints its JSON Schema.
    """
    from edgephi.benchmarks.bench.report.history import append
    from edgephi.benchmarks.bench.report.output import as_json as document
    from edgephi.benchmarks.bench.report.output import check_report_folder, write_report
    from edgephi.benchmarks.bench.report.table import markdown
    from edgephi.benchmarks.bench.run import bench
    from edgephi.benchmarks.bench.workload import read_workload
    from edgephi.commands.console import print_json_text
    from edgephi.commands.tables import print_markdown

    chosen = read_workload(workload)
    if output is not None:
        check_report_folder(output, force)
    with _progress(f"Measuring {chosen.name}") as advance_to:
        report = bench(folder, chosen, device=device, spinning=spinning, progress=advance_to)
    if record:
        append(report)
    if output is not None:
        write_report(output, report, force=force)
    if as_json:
        print_json_text(document(report))
    else:
        print_markdown(markdown(report))


@contextmanager
def _progress(task: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, on stderr and only on a terminal; yields a function told (done, in all)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from edgephi.commands.console import stderr

    console = stderr()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        identity = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(identity, completed=done, total=total)
