"""edgephi hub run: a matrix of bundles and hosted devices, measured and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgephi.commands.hub.options import DEFAULT_POLL_S, Output, Poll
from edgephi.commands.options import Json


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

    With --json, one object: the report, whose schema `edgephi hub schema` prints.
    """
    from edgephi.commands.hub.driving import announce, finish, prepare
    from edgephi.devices.ai_hub.matrix import graphs_of, plan, read_matrix

    wanted = read_matrix(matrix)
    root = matrix.absolute().parent
    if dry_run:
        chosen = graphs_of(wanted, root)
        graphs = {graph.sha256: graph for _, of_bundle in chosen for graph in of_bundle}
        announce(plan(wanted, root, chosen, {}), graphs, {}, "the hub that client.ini names")
        return
    fleet = prepare(wanted, root, output, retry_failed=retry_failed)
    timeout = 60 * wanted.timeout_minutes
    finish(fleet, lambda: fleet.wait(timeout_s=timeout, poll_s=poll, submit=True), as_json)
