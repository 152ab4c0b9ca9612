"""Where cells are measured: on this machine one after the other, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgephi.benchmarks.bench.lab.plan import Cell
from edgephi.benchmarks.bench.results import Report
from edgephi.child import call
from edgephi.errors import EdgephiError
from edgephi.files import replace_file


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    report: Report | None
    reason: str | None = None
    """Why there is no report."""


Outcomes = Generator[tuple[Cell, Outcome], None, None]
MEASURE = "edgephi.benchmarks.bench.lab.execute:measure"
"""What the process of a cell calls."""


class Executor(Protocol):
    """Measures cells; the lab decides which, and keeps what they give."""

    def run(self, cells: Sequence[Cell], begin: Callable[[Cell], float | None]) -> Outcomes:
        """Outcomes as they come, one cell at a time on each device. Who closes it ends what is still measured.

        Args:
            begin: called before a cell is measured; its time budget in seconds, None for none. It may end the lab by
                an exception, which passes through.
        """
        ...


class LocalExecutor:
    """A process for each cell on this machine: a crash there ends one cell, not the lab."""

    def __init__(self, partial: Callable[[Cell], Path], record: Callable[[Report], None] = lambda report: None) -> None:
        """Args:
        partial: the file in which a cell's unfinished report is kept while it is measured.
        record: told every report of this machine, once the lab has kept it.
        """
        self._partial, self._record = partial, record

    def run(self, cells: Sequence[Cell], begin: Callable[[Cell], float | None]) -> Outcomes:
        """See `Executor`."""
        for cell in cells:
            budget = begin(cell)
            try:
                document: Any = call(
                    MEASURE,
                    {
                        **request(cell, budget),
                        "bundle": str(cell.bundle.resolve()),
                        "workload": cell.workload,
                        "partial": str(self._partial(cell).absolute()),
                    },
                    timeout_s=None,
                    where=cell.title,
                )
            except EdgephiError as error:
                yield cell, Outcome(None, str(error))
                continue
            report = Report.model_validate(document)
            yield cell, Outcome(report)
            self._record(report)


def request(cell: Cell, budget_s: float | None) -> dict[str, Any]:
    """The arguments of `measure` that are the same on every machine."""
    return {
        "device": cell.device,
        "threads": cell.setting.threads,
        "spinning": cell.setting.spinning,
        "repetitions": cell.repetitions,
        "budget_s": budget_s,
        "label": cell.title,
    }


def measure(
    bundle: str,
    workload: str,
    device: str,
    threads: int | None,
    spinning: bool | None,
    repetitions: int | None,
    budget_s: float | None,
    label: str,
    partial: str,
) -> dict[str, Any]:
    """In the child: measure one cell; the report as JSON.

    Args:
        partial: file for what is known so far.

    Raises:
        EdgephiError: it cannot be measured.
    """
    from edgephi.benchmarks.bench.pace import INTERRUPTED, Pace
    from edgephi.benchmarks.bench.run import bench
    from edgephi.benchmarks.bench.workload import read_workload, with_repetitions

    chosen = read_workload(workload)
    pace = Pace(budget_s)

    def keep(report: Report) -> None:
        replace_file(Path(partial), report.model_dump_json().encode(), "Free space on the disk")

    report = bench(
        Path(bundle),
        chosen if repetitions is None else with_repetitions(chosen, repetitions),
        device=device,
        threads=threads,
        spinning=spinning,
        label=label[:120],
        pace=pace,
        keep=keep,
    )
    if pace.stopped == INTERRUPTED:  # by a terminal's Ctrl-C, which reaches this process as well as the lab
        keep(report)
        raise KeyboardInterrupt
    found: dict[str, Any] = report.model_dump(mode="json")
    return found
