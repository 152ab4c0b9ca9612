"""What running, submitting and waiting share: the plan in numbers, progress, the table, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.errors import BundleError, HubError, printable

if TYPE_CHECKING:
    from edgephi.devices.ai_hub.client import HubClient
    from edgephi.devices.ai_hub.fleet import Fleet
    from edgephi.devices.ai_hub.graphs import HubGraph
    from edgephi.devices.ai_hub.matrix import Matrix
    from edgephi.devices.ai_hub.report import FleetReport, JobRecord
    from edgephi.devices.ai_hub.state import FleetState, Step


def say(line: str) -> None:
    """A line on stderr."""
    from edgephi.commands.console import stderr

    stderr().print(printable(line), soft_wrap=True)


def announce(steps: Sequence[Step], graphs: Mapping[str, HubGraph], uploaded: Mapping[str, str], server: str) -> None:
    """Say what leaves this machine, before it does."""
    from edgephi.commands.console import format_bytes

    new = [graph for sha256, graph in graphs.items() if sha256 not in uploaded]
    for graph in new:
        say(f"to upload: {graph.bundle} {graph.name}, {format_bytes(graph.bytes)}")
    total = format_bytes(sum(graph.bytes for graph in new))
    left = sum(step.status in ("planned", "submitting") for step in steps)
    say(f"{len(new)} of {len(graphs)} graphs to upload ({total}), {left} of {len(steps)} jobs to submit to {server}")


def prepare(matrix: Matrix, root: Path, output: Path, *, retry_failed: bool) -> Fleet:
    """Check everything that can be checked before something is sent, and write down the plan.

    Raises:
        EdgephiError: the matrix, a bundle, the token, a device or the state of an earlier run does not fit.
    """
    from edgephi.devices.ai_hub.client import HubClient
    from edgephi.devices.ai_hub.fleet import Fleet
    from edgephi.devices.ai_hub.matrix import graphs_of, plan, require_devices
    from edgephi.devices.ai_hub.state import STATE, new_state, planned, read_state, write_state

    chosen = graphs_of(matrix, root)
    client = HubClient()
    chipsets = {device.name: device.chipset for device in client.devices()}
    require_devices(matrix.devices, chipsets)
    path = output / STATE
    state = read_state(path) if path.is_file() else new_state(client.server)
    require_server(state, client, path)
    steps = plan(matrix, root, chosen, chipsets)
    state = planned(state, steps, retry_failed=retry_failed)
    write_state(path, state)
    graphs = {graph.sha256: graph for _, of_bundle in chosen for graph in of_bundle}
    announce(list(state.steps.values()), graphs, state.uploads, client.server)
    return Fleet(client, path, state, graphs, lambda step, what: None)


def require_server(state: FleetState, client: HubClient, path: Path) -> None:
    """A run's job ids mean nothing on another server.

    Raises:
        BundleError: the run was submitted to another one.
    """
    if state.server != client.server:
        raise BundleError(
            f"this run was submitted to {state.server}, and client.ini names {client.server}",
            where=path,
            remedy="Choose another --output, or change client.ini back",
        )


@contextmanager
def showing(fleet: Fleet) -> Iterator[None]:
    """A bar over the jobs on a terminal; a line on stderr for each that was submitted or has ended."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from edgephi.commands.console import stderr

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


def finish(fleet: Fleet, work: Callable[[], None], as_json: bool) -> None:
    """Do the work, write the report whatever becomes of it, show it, and fail when a job did.

    Raises:
        HubError: a job failed, or was skipped because one did.
    """
    from edgephi.commands.console import print_json_text

    try:
        with showing(fleet):
            work()
    finally:
        merged = fleet.write_report()
    if as_json:
        print_json_text(merged.model_dump_json())
    else:
        _print(merged)
        say(f"report: {fleet.path.parent / 'fleet.json'}")
    failed = [record for record in merged.records if record.status == "failed"]
    if failed:
        first = failed[0]
        raise HubError(
            f"{len(failed)} of {len(merged.records)} jobs failed, the first for: {first.reason}",
            where=first.url,
            remedy="Look at the job's page, change what it names, and run again with --retry-failed",
        )


def _print(merged: FleetReport) -> None:
    from rich.table import Table

    from edgephi.commands.console import stdout

    table = Table(box=None, pad_edge=False)
    for heading in ("device", "graph", "job", "status"):
        table.add_column(heading)
    for heading in ("inference", "peak memory", "NPU / GPU / CPU"):
        table.add_column(heading, justify="right")
    for record in merged.records:
        table.add_row(*map(printable, _cells(record)))
    if merged.records:
        stdout().print(table)
    for record in merged.records:
        for warning in record.warnings:
            say(f"{record.graph} on {record.device}: {warning}")


def _cells(record: JobRecord) -> tuple[str, ...]:
    from edgephi.commands.console import format_bytes

    facts = (record.device, f"{record.bundle} {record.graph}", record.kind, record.status)
    measured = record.measured
    if measured is None:
        return (*facts, "", "", "")
    peak = "not measured" if measured.peak_memory is None else format_bytes(measured.peak_memory)
    layers = measured.layers
    return (*facts, f"{1000 * measured.inference_s:.2f} ms", peak, f"{layers.npu} / {layers.gpu} / {layers.cpu}")
