"""edgephi bench: how fast a bundle is on this machine, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgephi.commands.measure.bench_lab import lab
from edgephi.commands.measure.bench_options import checked_label, numbers_of, seconds_of, threads_of
from edgephi.commands.measure.bench_reports import compare, history, table
from edgephi.commands.terminal.options import Bundle, Device, Json, Prefill, bundle_folder, model_names
from edgephi.errors import UsageError


class _BenchGroup(TyperGroup):
    """`edgephi bench DIR` means `edgephi bench run DIR`, and `edgephi bench FILE.toml` means `edgephi bench lab`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["lab" if args[0].endswith(".toml") else "run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_BenchGroup,
    help="Measure a bundle on this machine, compare reports, and watch figures over time. "
    "`edgephi bench DIR` is short for `edgephi bench run DIR`, and `edgephi bench lab.toml` for a lab.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command("compare")(compare)
app.command("history")(history)
app.command("table")(table)
app.command("lab")(lab)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of report.json."""
    from edgephi.benchmarks.bench.results import Report
    from edgephi.commands.terminal.console import print_json

    print_json(Report.model_json_schema(), indent=2)


@app.command("run")
def run(
    folder: Bundle,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="A built-in workload (default quick), or a TOML file.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="N,N", help="Instead of a workload: prompts of these lengths.", show_default=False
        ),
    ] = None,
    new: Annotated[
        str | None,
        typer.Option(
            "--new", "-n", metavar="N,N", help="Instead of a workload: decode so many tokens.", show_default=False
        ),
    ] = None,
    depths: Annotated[
        str,
        typer.Option("--depth", "-d", metavar="N,N", help="Of -p and -n: tokens in the KV cache before."),
    ] = "0",
    threads: Annotated[
        str | None,
        typer.Option(
            "--threads", "-t", metavar="N,N", help="CPU threads; a report for each value.", show_default=False
        ),
    ] = None,
    spinning: Annotated[
        bool | None,
        typer.Option(
            "--spinning/--no-spinning",
            help="Whether idle CPU threads wait actively; by default as the device profile and the power mode say.",
            show_default=False,
        ),
    ] = None,
    prefill: Prefill = None,
    repetitions: Annotated[
        int | None,
        typer.Option(min=1, max=200, help="Instead of the workload's, of loads as well.", show_default=False),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="No run begins after it, as 90s, 10m or 1h.", show_default=False),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What to call this machine or run in tables.", show_default=False),
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
    long-context, speculation, or a file. `edgephi bench list` says what they ask and how long they take. Cases that do
    not fit the model's context are listed with the reason. A case whose greedy tokens differ between repetitions has no
    figures; a bundle that breaks its recorded quality contract is not measured at all, nor is one that does not run on
    the --device. What this machine does not meter is "not measured".

    Energy, where a meter exists, has the idle power of the machine subtracted. Shares of the processors are of all of
    them. Percentiles between tokens are of each repetition. A repetition during which other processes were busy is
    done again, a bounded number of times.

    After Ctrl-C, or when the time budget is used up, the report has what was measured until then and says so; Ctrl-C
    exits with status 130 and is not kept for the history. While it runs, REPORT.partial.json beside the report has what
    is known so far, so that a crash does not lose it. With several --threads, REPORT holds a folder for each.

    With --json, the document of report.json; `edgephi bench schema` prints its JSON Schema. With several --threads, a
    list of them.
    """
    from edgephi.benchmarks.bench.pace import INTERRUPTED, Pace
    from edgephi.benchmarks.bench.report.history import append
    from edgephi.benchmarks.bench.report.output import as_json as document
    from edgephi.benchmarks.bench.report.output import check_report_folder, keep_partial, write_report
    from edgephi.benchmarks.bench.report.table import markdown
    from edgephi.benchmarks.bench.run import bench
    from edgephi.benchmarks.bench.workload import of_lists, read_workload, with_repetitions
    from edgephi.commands.terminal.console import print_json_text
    from edgephi.commands.terminal.tables import print_markdown

    if prompts is None and new is None:
        chosen = read_workload(workload or "quick")
    elif workload is not None:
        raise UsageError("--workload and -p or -n exclude each other", remedy="Leave one of them out")
    else:
        chosen = of_lists(numbers_of("-p", prompts), numbers_of("-n", new), numbers_of("-d", depths))
    if repetitions is not None:
        chosen = with_repetitions(chosen, repetitions)
    label = checked_label(label)
    counts: list[int | None] = [*threads_of(threads)] or [None]
    places = [output if output is None or len(counts) == 1 else output / f"threads-{count}" for count in counts]
    for place in places:
        if place is not None:
            check_report_folder(place, force)
    pace = Pace(None if time_budget is None else seconds_of("--time-budget", time_budget))
    reports = []
    for count, place in zip(counts, places, strict=True):
        what = f"Measuring {chosen.name}" + (f", {count} threads" if len(counts) > 1 else "")
        with _progress(what) as advance_to, keep_partial(place) as keep:
            report = bench(
                folder,
                chosen,
                device=device,
                threads=count,
                spinning=spinning,
                prefill=prefill,
                label=label,
                pace=pace,
                progress=advance_to,
                keep=keep,
            )
            if place is not None:
                write_report(place, report, force=force)
        reports.append(report)
        if pace.stopped == INTERRUPTED:
            break
        if record:
            append(report)
    if as_json:
        several = "[" + ",".join(map(document, reports)) + "]"
        print_json_text(document(reports[0]) if len(counts) == 1 else several)
    else:
        print_markdown("\n".join(map(markdown, reports)))
    if pace.stopped == INTERRUPTED:
        raise typer.Exit(130)


@app.command("list")
def list_workloads(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="A bundle or an installed model: say how long each workload takes with it here.",
            show_default=False,
            parser=bundle_folder,
            autocompletion=model_names,
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """List the built-in workloads: what they ask, and how many minutes they take on this machine.

    Minutes are those of the last whole run of the bundle in the history. For a workload that was not run, they are
    estimated from a quick measurement (one load, a short prompt and a few tokens): long contexts take longer than that,
    and so does a machine that is busier. Tokens are of all repetitions and warm-ups.

    With --json, a list of name, description, and with DIR: cases, loads, prompt_tokens, new_tokens, refused (cases that
    do not fit the context), seconds, measured (when it was run, or null: seconds is an estimate).
    """
    from dataclasses import asdict

    from edgephi.benchmarks.bench.estimate import ask
    from edgephi.benchmarks.bench.workload import built_in, read_workload
    from edgephi.commands.terminal.console import print_json
    from edgephi.commands.terminal.tables import print_table

    workloads = [read_workload(name) for name in built_in()]
    asked = ask(folder, workloads, device) if folder is not None else []
    if as_json:
        records = [{"name": one.name, "description": one.content.description} for one in workloads]
        pairs = zip(records, asked, strict=True) if asked else ((record, None) for record in records)
        print_json([record | (asdict(one) if one else {}) for record, one in pairs])
        return
    if not asked:
        rows = [(one.name, one.content.description) for one in workloads]
        print_table(("workload", "what it asks"), rows, title="Name a bundle to see how long they take with it here.")
        return
    numbers = ("cases", "loads", "prompt tokens", "new tokens", "minutes")
    table_rows = [
        (
            workload.name,
            workload.content.description,
            f"{one.cases}" + (f" ({one.refused} do not fit)" if one.refused else ""),
            str(one.loads),
            f"{one.prompt_tokens:,}",
            f"{one.new_tokens:,}",
            f"{one.seconds / 60:.1f}",
            f"measured {one.measured}" if one.measured else "estimated from a quick measurement",
        )
        for workload, one in zip(workloads, asked, strict=True)
    ]
    print_table(("workload", "what it asks", *numbers, "which are"), table_rows, right=numbers)


@contextmanager
def _progress(task: str) -> Iterator[Callable[[int, int, float | None], None]]:
    """A bar with the time left, on stderr and only on a terminal; yields a function told (done, in all, seconds)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from edgephi.commands.terminal.console import stderr

    console = stderr()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        identity = bar.add_task(task, total=None, left="")

        def advance_to(done: int, total: int, left: float | None) -> None:
            words = "" if left is None else f"about {_clock(left)} left"
            bar.update(identity, completed=done, total=total, left=words)

        yield advance_to


def _clock(seconds: float) -> str:
    """583 → 9:43."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
