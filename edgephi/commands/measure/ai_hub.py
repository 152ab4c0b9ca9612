"""edgephi ai-hub: a bundle's NPU graphs on the hosted devices of Qualcomm AI Hub. Only this verb uses the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgephi.commands.terminal.options import Bundle, Json
from edgephi.errors import printable

if TYPE_CHECKING:
    from edgephi.devices.ai_hub.fleet import Fleet
    from edgephi.devices.ai_hub.graphs import HubGraph
    from edgephi.devices.ai_hub.matrix import Matrix
    from edgephi.devices.ai_hub.report import FleetReport, JobRecord
    from edgephi.devices.ai_hub.state import Step

app = typer.Typer(
    help="Measure NPU graphs on the hosted devices of Qualcomm AI Hub (extra: hub).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Output = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder of the run: its state, fleet.json, profiles.", show_default=False),
]
Poll = Annotated[float, typer.Option(min=0.01, metavar="SECONDS", help="Pause between looks at running jobs.")]
DEFAULT_POLL_S = 15.0


@app.command("devices")
def devices(as_json: Json = False) -> None:
    """List the hosted devices.

    With --json, one object: server (its address) and devices, a list of name, os, chipset (or null) and attributes,
    which are the hub's own words for the runtimes, the chip and the vendor.
    """
    from dataclasses import asdict

    from edgephi.commands.terminal.console import print_json
    from edgephi.devices.ai_hub.client import HubClient

    client = HubClient()
    found = client.devices()
    if as_json:
        facts = {"server": client.server, "devices": [asdict(device) for device in found]}
        print_json(facts)
        return
    from edgephi.commands.terminal.tables import print_table

    print_table(("device", "system", "chipset"), [(one.name, one.os, one.chipset or "") for one in found])


@app.command("run")
def run(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX.toml", help="What to measure where.", show_default=False)],
    output: Output,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded and submitted; touch no network.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Submit jobs again that failed in an earlier run.")
    ] = False,
    poll: Poll = DEFAULT_POLL_S,
    as_json: Json = False,
) -> None:
    """Measure the NPU graphs of bundles on hosted devices.

    Run it again to go on where it ended: jobs that are submitted or finished are picked up, only what is missing is
    uploaded and submitted. A failed job stays in the report with the hub's reason, and ends the command with status 1.

    \b
    MATRIX.toml:
      format = 1
      devices = ["Snapdragon X Elite CRD"]
      jobs = ["profile"]                  # of compile, link, profile, inference
      timeout_minutes = 240               # of waiting
      [[bundle]]
      folder = "phi-4-mini-x-elite"       # relative to this file
      graphs = ["prefill_*"]              # every graph compiled for an NPU when left out
      inputs = { "prefill_0" = "a.npz" }  # what inference computes
      [options]                           # the hub's own, for each kind of job; {graph} is the graph's name
      profile = "--max_profiler_iterations 50"

    Where compile is among the jobs, the others run what it made; link makes one binary of everything compiled for a
    device, and the others run that.

    Where all graphs of a phase of a bundle were profiled on a device, DIR/bench has a report that `edgephi bench table`
    and `compare` read: tokens/s of the NPU's graphs alone, on random values, without embedding, head and sampling.

    With --json, one object: the report, whose schema `edgephi ai-hub schema` prints.
    """
    from edgephi.devices.ai_hub.matrix import graphs_of, plan, read_matrix

    wanted = read_matrix(matrix)
    root = matrix.absolute().parent
    if dry_run:
        chosen = graphs_of(wanted, root)
        graphs = {graph.sha256: graph for _, of_bundle in chosen for graph in of_bundle}
        _announce(plan(wanted, root, chosen, {}), graphs, {}, "the hub that client.ini names")
        return
    fleet = _prepare(wanted, root, output, retry_failed=retry_failed)
    timeout = 60 * wanted.timeout_minutes
    _finish(fleet, lambda: fleet.wait(timeout_s=timeout, poll_s=poll, submit=True), as_json)


@app.command("submit")
def submit(
    folder: Bundle,
    device: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="As `edgephi ai-hub devices` lists it; repeatable.", show_default=False),
    ],
    output: Output,
    job: Annotated[Literal["compile", "profile"], typer.Option(help="What to do with each graph.")] = "profile",
    graph: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name or pattern of a graph; repeatable; all for an NPU when left out."),
    ] = None,
) -> None:
    """Submit a job for each NPU graph of a bundle and each device, and return; `edgephi ai-hub wait` fetches results.

    Prints the path of the run's state, which `wait` takes. Submitting again submits only what is missing.
    """
    from edgephi.devices.ai_hub.matrix import BundleChoice, Matrix

    choice = BundleChoice(folder=str(folder.absolute()), graphs=tuple(graph or ()))
    matrix = Matrix(format=1, devices=tuple(dict.fromkeys(device)), jobs=(job,), bundle=(choice,))
    fleet = _prepare(matrix, folder.absolute().parent, output, retry_failed=False)
    with _showing(fleet):
        fleet.submit_ready()
    typer.echo(printable(str(fleet.path)))


@app.command("wait")
def wait(
    state: Annotated[
        Path,
        typer.Argument(metavar="STATE", help="The state.json of a run, or its folder.", show_default=False),
    ],
    timeout_minutes: Annotated[float, typer.Option(min=0, help="Longest time to wait.")] = 240,
    poll: Poll = DEFAULT_POLL_S,
    as_json: Json = False,
) -> None:
    """Wait for the submitted jobs of a run, fetch what they measured, and merge it into fleet.json beside the state.

    With --json, one object: the report, whose schema `edgephi ai-hub schema` prints.
    """
    from edgephi.devices.ai_hub.fleet import resume

    fleet = resume(state)
    _finish(fleet, lambda: fleet.wait(timeout_s=60 * timeout_minutes, poll_s=poll, submit=False), as_json)
    left = sum(step.status in ("planned", "submitting") for step in fleet.state.steps.values())
    if left:
        _say(f"{left} jobs of this run are not submitted; the command that planned them goes on with them")


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of fleet.json."""
    from edgephi.commands.terminal.console import print_json
    from edgephi.devices.ai_hub.report import FleetReport

    print_json(FleetReport.model_json_schema(), indent=2)


def _say(line: str) -> None:
    """A line on stderr."""
    from edgephi.commands.terminal.console import stderr

    stderr().print(printable(line), soft_wrap=True)


def _announce(steps: Sequence[Step], graphs: Mapping[str, HubGraph], uploaded: Mapping[str, str], server: str) -> None:
    """Say what leaves this machine, before it does."""
    from edgephi.commands.terminal.console import format_bytes

    new = [graph for sha256, graph in graphs.items() if sha256 not in uploaded]
    for graph in new:
        _say(f"to upload: {graph.bundle} {graph.name}, {format_bytes(graph.bytes)}")
    total = format_bytes(sum(graph.bytes for graph in new))
    left = sum(step.status in ("planned", "submitting") for step in steps)
    _say(f"{len(new)} of {len(graphs)} graphs to upload ({total}), {left} of {len(steps)} jobs to submit to {server}")


def _prepare(matrix: Matrix, root: Path, output: Path, *, retry_failed: bool) -> Fleet:
    """The plan, checked, written down and announced."""
    from edgephi.devices.ai_hub.fleet import prepare

    fleet = prepare(matrix, root, output, retry_failed=retry_failed)
    _announce(list(fleet.state.steps.values()), fleet.graphs, fleet.state.uploads, fleet.client.server)
    return fleet


@contextmanager
def _showing(fleet: Fleet) -> Iterator[None]:
    """A bar over the jobs on a terminal; a line on stderr for each that was submitted or has ended."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from edgephi.commands.terminal.console import stderr

    console = stderr()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        identity = bar.add_task("jobs", total=len(fleet.state.steps))

        def tell(step: Step, what: str) -> None:
            line = printable(f"{step.kind} {step.bundle} {step.graph} on {step.device}: {what}")
            ended = sum(other.status == "finished" for other in fleet.state.steps.values())
            bar.update(identity, completed=ended, description=line[:60])
            if fleet.state.steps[step.key].status != step.status or what.startswith("uploading"):
                bar.console.print(line, soft_wrap=True)

        fleet.tell = tell
        yield


def _finish(fleet: Fleet, work: Callable[[], None], as_json: bool) -> None:
    """Do the work, write the reports whatever becomes of it, show them, and fail when a job did.

    Raises:
        HubError: a job failed, or was skipped because one did.
    """
    from edgephi.benchmarks.bench.hosted import write_hosted_reports
    from edgephi.commands.terminal.console import print_json_text

    folder = fleet.path.parent
    try:
        with _showing(fleet):
            work()
    finally:
        merged = fleet.write_report()
        written = write_hosted_reports(merged, folder)
    if as_json:
        print_json_text(merged.model_dump_json())
    else:
        _print(merged)
        _say(f"report: {folder / 'fleet.json'}")
        if written:
            _say(f"for `edgephi bench table`: {written[0].parent}")
    merged.require_success()


def _print(merged: FleetReport) -> None:
    from edgephi.commands.terminal.tables import print_table

    measured = ("inference", "peak memory", "NPU / GPU / CPU")
    if merged.records:
        headings = ("device", "graph", "job", "status", *measured)
        print_table(headings, [_cells(record) for record in merged.records], right=measured)
    for record in merged.records:
        for warning in record.warnings:
            _say(f"{record.graph} on {record.device}: {warning}")


def _cells(record: JobRecord) -> tuple[str, ...]:
    from edgephi.commands.terminal.console import format_bytes

    facts = (record.device, f"{record.bundle} {record.graph}", record.kind, record.status)
    measured = record.measured
    if measured is None:
        return (*facts, "", "", "")
    peak = "not measured" if measured.peak_memory is None else format_bytes(measured.peak_memory)
    layers = measured.layers
    return (*facts, f"{1000 * measured.inference_s:.2f} ms", peak, f"{layers.npu} / {layers.gpu} / {layers.cpu}")
