"""edgephi bench lab: many bundles, workloads, devices and settings from one file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgephi.commands.options import Json
from edgephi.errors import UsageError, printable


def lab(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A TOML file that describes a lab.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for reports and tables; by default FILE-results.", show_default=False),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="No cell begins after it, as 90s, 10m or 8h.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the cells and their states.")] = False,
    as_json: Json = False,
) -> None:
    """Measure every combination of a lab's bundles, workloads, devices and settings on this machine, one by one.

    The file has lists `bundles` (folders, relative to it) and `workloads` (built-in names or files), and may have
    `devices` (default auto), `[[settings]]` with `name`, `threads` and `spinning`, `repetitions`, and `cell_seconds`
    (time budget of each cell).

    Each cell is measured in a process of its own. DIR has a report for every cell, and table.md, table.csv and lab.json
    for all, written after each. The same command goes on where it was stopped: by Ctrl-C (status 130), by the time
    budget, or by a crash, whose partial reports are kept. Cells that failed are tried again. Other bundles, workloads,
    settings or versions of libraries are other cells.

    Exit status 1 when a cell failed. With --json, the document of lab.json: format, lab (the file) and cells, a list of
    name, bundle, workload, device, setting, state ("done", "partial", "failed", "waiting"), reason, seconds, noise
    (null or a sentence), figures (by name, in seconds, bytes and joules).
    """
    from edgephi.benchmarks.bench.lab.execute import LocalExecutor
    from edgephi.benchmarks.bench.lab.plan import read_lab
    from edgephi.benchmarks.bench.lab.run import partial_file, read_states, run_lab, states_markdown
    from edgephi.commands.bench_options import seconds_of
    from edgephi.commands.console import print_json, stderr
    from edgephi.commands.tables import print_markdown

    described, cells = read_lab(file)
    folder = output or file.with_name(f"{file.stem}-results")
    if folder.exists() and not folder.is_dir():
        raise UsageError("the output exists and is no folder", where=folder, remedy="Choose another --output")
    budget_s = None if time_budget is None else seconds_of("--time-budget", time_budget)

    def tell(words: str) -> None:
        stderr().print(printable(words), soft_wrap=True)

    interrupted = False
    if dry_run:
        states = read_states(folder, cells)
    else:
        executor = LocalExecutor(lambda cell: partial_file(folder, cell))
        try:
            states = run_lab(described, cells, folder, executor, budget_s=budget_s, tell=tell)
        except KeyboardInterrupt:
            interrupted = True
            states = read_states(folder, cells)
    if as_json:
        print_json({"format": 1, "lab": described.model_dump(mode="json"), "cells": [one.as_json() for one in states]})
    else:
        print_markdown(states_markdown(states))
    sys.stdout.flush()
    if interrupted:
        raise typer.Exit(130)
    if any(one.state == "failed" for one in states):
        raise typer.Exit(1)
