"""Cells measured on many machines by Dask: each worker is a device, and Dask finds one that has a cell's resource."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from edgephi.benchmarks.bench.lab.execute import Outcome, Outcomes, request
from edgephi.benchmarks.bench.lab.plan import Cell
from edgephi.benchmarks.bench.lab.worker import measure_cell, unfinished
from edgephi.benchmarks.bench.results import Report
from edgephi.benchmarks.bench.workload import workload_files
from edgephi.benchmarks.cluster.client import Answer, Cluster, Job, Words, at_work, place
from edgephi.benchmarks.cluster.worker import RUNTIME
from edgephi.benchmarks.report import library_versions
from edgephi.bundle import contents_sha256, read_manifest
from edgephi.files import replace_file
from edgephi.records import first_problem

if TYPE_CHECKING:
    from distributed import Client

WORDS = Words("cell", "cells", "Start it and its workers, then repeat the command: cells that are done stay")


class DaskExecutor:
    """Workers of a Dask scheduler, one cell at a time on each."""

    def __init__(self, address: str, partial: Callable[[Cell], Path], tell: Callable[[str], None]) -> None:
        """Args:
        address: as `tcp://desk:8786`.
        partial: the file in which a cell's unfinished report is kept when the lab is interrupted.
        tell: given a line when cells wait for a worker.
        """
        self._partial = partial
        self._cluster = Cluster(address, measure_cell, WORDS, tell, keep=self._keep_unfinished)
        self._hashes: dict[Path, str] = {}
        self._cells: dict[str, Cell] = {}

    def run(self, cells: Sequence[Cell], begin: Callable[[Cell], float | None]) -> Outcomes:
        """See `Executor`.

        Raises:
            ClusterError: the scheduler cannot be reached, or went away.
            UsageError: Dask is not installed, or the address is none.
        """
        self._cells = {cell.name: cell for cell in cells}
        jobs = [Job(cell.name, cell.resource) for cell in cells]
        with closing(self._cluster.run(jobs, lambda job: begin(self._cells[job.name]), self._order)) as answers:
            for job, answer in answers:
                yield self._cells[job.name], self._outcome(self._cells[job.name], answer)

    def _order(self, job: Job, budget_s: float | None) -> dict[str, Any]:
        cell = self._cells[job.name]
        folder = cell.bundle.resolve()
        if folder not in self._hashes:
            self._hashes[folder] = contents_sha256(read_manifest(folder))
        return {
            "name": cell.name,
            "arguments": request(cell, budget_s),
            "bundle": place(cell.machine.bundles if cell.machine else None, folder),
            "sha256": self._hashes[folder],
            "workload": workload_files(cell.workload),
            "versions": library_versions(*RUNTIME),
        }

    def _outcome(self, cell: Cell, answer: Answer) -> Outcome:
        if "reason" in answer:
            return Outcome(None, str(answer["reason"]))
        try:
            report = Report.model_validate(answer.get("report"))
        except ValidationError as error:
            return Outcome(None, f"a worker sent no report of this version: {first_problem(error)}")
        if report.bundle.sha256 != self._hashes[cell.bundle.resolve()] or report.label != cell.title[:120]:
            return Outcome(None, f"a worker sent the report of something else: {report.label}, {report.bundle.name}")
        return Outcome(report)

    def _keep_unfinished(self, client: Client, names: Collection[str]) -> None:
        answers = client.run(unfinished, workers=at_work(client), on_error="ignore")
        for name, report in ((name, text) for known in answers.values() for name, text in known.items()):
            if name in names:
                replace_file(self._partial(self._cells[name]), report.encode(), "Free space on the disk")
