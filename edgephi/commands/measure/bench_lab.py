"""edgephi bench lab: many bundles, workloads, devices and settings from one file."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from edgephi.commands.terminal.options import Json
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
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Measure on the workers of this Dask scheduler, as tcp://desk:8786, instead of here.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        bool, typer.Option(help="Keep the figures of cells measured here for `edgephi bench history`.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the cells and their states.")] = False,
    as_json: Json = False,
) -> None:
    """Measure every combination of a lab's bundles, workloads, devices and settings, one by one.

    The file has lists `bundles` (folders, relative to it, or installed models) and `workloads` (built-in names or
    files), and may have `devices` (default auto), `[[settings]]` with `name`, `threads` and `spinning`, `repetitions`,
    `cell_seconds` (time budget of each cell) and `scheduler`.

    With a scheduler, cells are measured by `dask worker` on other machines (pip's extra `cluster`). A worker has the
    devices that its --resources name: `edgephi-cpu=1` for the device cpu. One cell at a time is measured on each; a
    lost worker's cell is measured again by another that has the resource, or waits for one. Devices of certain machines
    are `[[devices]]` with `name`, `device`, `resource` and `bundles` (the folder there that has the bundles).

    Each cell is measured in a process of its own. DIR has a report for every cell, and table.md, table.csv and lab.json
    for all, written after each. The same command goes on where it was stopped: by Ctrl-C (status 130), by the time
    budget, or by a crash, whose partial reports are kept. Cells that failed are tried again. Other bundles, workloads,
    settings or versions of libraries are other cells. Reports of cells that this machine measured are kept for
    `edgephi bench history`, those of workers are not.

    Exit status 1 when a cell failed. With --json, the document of lab.json: format, lab (the file) and cells, a list of
    name, bundle, workload, device, setting, state ("done", "partial", "failed", "waiting"), reason, seconds, noise
    (null or a sentence), figures (by name, in seconds, bytes and joules).
    """
    from edgephi.benchmarks.bench.lab.cluster import DaskExecutor
    from edgephi.benchmarks.bench.lab.execute import Executor, LocalExecutor
    from edgephi.benchmarks.bench.lab.plan import read_lab
    from edgephi.benchmarks.bench.lab.run import partial_file, read_states, run_lab, states_markdown
    from edgephi.benchmarks.bench.report.history import append
    from edgephi.commands.measure.bench_options import seconds_of
    from edgephi.commands.terminal.console import print_json, stderr
    from edgephi.commands.terminal.tables import print_markdown

    described, cells = read_lab(file, _installed)
    folder = output or file.with_name(f"{file.stem}-results")
    if folder.exists() and not folder.is_dir():
        raise UsageError("the output exists and is no folder", where=folder, remedy="Choose another --output")
    budget_s = None if time_budget is None else seconds_of("--time-budget", time_budget)

    def tell(words: str) -> None:
        stderr().print(printable(words), soft_wrap=True)

    address = described.scheduler if scheduler is None else scheduler
    elsewhere = [cell.device_name for cell in cells if cell.machine is not None]
    if address is None and elsewhere and not dry_run:
        raise UsageError(
            f"device {elsewhere[0]!r} is a resource of workers, and there is no scheduler",
            where=file,
            remedy="Pass --scheduler, or name the devices of this machine, as devices = ['cpu']",
        )
    interrupted = False
    if dry_run:
        states = read_states(folder, cells)
    else:
        kept = partial(partial_file, folder)
        executor: Executor
        if address is None:
            executor = LocalExecutor(kept, append) if record else LocalExecutor(kept)
        else:
            executor = DaskExecutor(address, kept, tell)
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


def _installed(name: str) -> Path | None:
    from edgephi.store.library import find_installed
    from edgephi.store.names import as_name

    plain = as_name(name)
    found = find_installed(plain) if plain is not None else None
    return found.folder if found is not None else None
