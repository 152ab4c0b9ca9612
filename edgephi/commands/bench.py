"""edgephi bench: how fast a bundle is on this machine, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgephi.commands.bench_reports import compare, history, table
from edgephi.commands.options import Bundle, Device, Json


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

app.command("compare")(compare)
app.command("history")(history)
app.command("table")(table)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of report.json."""
    from edgephi.benchmarks.bench.results import Report
    from edgephi.commands.console import print_json

    print_json(Report.model_json_schema(), indent=2)


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
