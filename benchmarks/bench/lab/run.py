"""A lab's folder: what is in it says which cells are done, so that the same command goes on where it stopped.

OUTPUT/cells/NAME/report.json …       a cell's report, whole or stopped
OUTPUT/cells/NAME.partial.json        while it is measured
OUTPUT/cells/NAME.failed.json         why it could not be measured
OUTPUT/lab.json, table.csv, table.md  the states and figures of all cells, written anew after each
OUTPUT/lab.lock                       while a command measures into the folder
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgephi.benchmarks.bench.lab.execute import Executor, Outcome
from edgephi.benchmarks.bench.lab.plan import Cell, Lab
from edgephi.benchmarks.bench.report.comparison import noise
from edgephi.benchmarks.bench.report.headline import HEADLINES, headline_cell, headlines, shown
from edgephi.benchmarks.bench.report.output import write_report
from edgephi.benchmarks.bench.report.rows import as_csv
from edgephi.benchmarks.bench.results import Report, read_report
from edgephi.benchmarks.report import markdown_table
from edgephi.errors import BundleError, EdgephiError, OutputError
from edgephi.files import read_json_object, replace_file, unwritable
from edgephi.lock import locked

REMEDY = "Name another --output"

State = Literal["done", "partial", "failed", "waiting"]


@dataclass(frozen=True)
class CellState:
    """A cell as its folder says."""

    cell: Cell
    state: State
    reason: str | None = None
    """Why it is partial or failed."""
    report: Report | None = None

    def as_json(self) -> dict[str, object]:
        """name, bundle, workload, device, setting, state, reason, seconds, noise, figures."""
        report = self.report
        return {
            "name": self.cell.name,
            "bundle": self.cell.bundle.name,
            "workload": Path(self.cell.workload).stem,
            "device": self.cell.device_name,
            "setting": self.cell.setting.name,
            "state": self.state,
            "reason": self.reason,
            "seconds": report.seconds if report else None,
            "noise": noise(report) if report else None,
            "figures": headlines(report) if report else {},
        }


class OutOfTime(Exception):
    """The lab's time budget is used up; only `run_lab` sees it."""


def partial_file(output: Path, cell: Cell) -> Path:
    """Where a cell's unfinished report is kept."""
    return output / "cells" / f"{cell.name}.partial.json"


def run_lab(
    lab: Lab,
    cells: Sequence[Cell],
    output: Path,
    executor: Executor,
    *,
    budget_s: float | None = None,
    tell: Callable[[str], None] = lambda words: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[CellState]:
    """Measure the cells that are not done yet; the state of all.

    Args:
        budget_s: no cell begins after it, and one that began is stopped by it.
        tell: given a line when a cell begins and ends.

    Raises:
        OutputError: the folder cannot be written, or another command measures into it.
        KeyboardInterrupt: it was interrupted; what was measured is kept.
    """
    started = clock()
    with ExitStack() as held:
        try:
            (output / "cells").mkdir(parents=True, exist_ok=True)
            # two commands would measure the same cells at once, and disturb each other
            held.enter_context(locked(output / "lab.lock", _measured_elsewhere))
        except OSError as problem:
            raise unwritable(problem, output, REMEDY) from problem
        _adopt(output, cells)
        states = read_states(output, cells)
        waiting = [one.cell for one in states if one.state != "done"]
        done = len(cells) - len(waiting)
        numbers: dict[str, int] = {}
        if done:
            tell(f"{done} of {len(cells)} cells were done before")

        def begin(cell: Cell) -> float | None:
            left = None if budget_s is None else budget_s - (clock() - started)
            if left is not None and left <= 0:
                raise OutOfTime
            # a cell whose worker is awaited begins again
            number = numbers.setdefault(cell.name, done + len(numbers) + 1)
            tell(f"{number} of {len(cells)}  {cell.title}")
            return min((limit for limit in (left, lab.cell_seconds) if limit is not None), default=None)

        try:
            with closing(executor.run(waiting, begin)) as outcomes:
                for cell, outcome in outcomes:
                    _keep(output, cell, outcome)
                    (state,) = read_states(output, [cell])
                    tell(f"    {cell.title}: {_sentence(state)}")
                    _write_tables(output, lab, read_states(output, cells))
        except OutOfTime:
            tell("the time budget is used up; the same command goes on with the cells that are left")
        finally:
            _adopt(output, cells)
            states = read_states(output, cells)
            _write_tables(output, lab, states)
        return states


def _measured_elsewhere(holder: str, path: Path) -> EdgephiError:
    return OutputError(
        f"another command{holder} measures into this folder",
        where=path.parent,
        remedy="Wait until it ends, or name another --output",
    )


def _keep(output: Path, cell: Cell, outcome: Outcome) -> None:
    failed = _failed_file(output, cell)
    if outcome.report is None:
        record = json.dumps({"reason": outcome.reason}, ensure_ascii=False)
        replace_file(failed, record.encode(), REMEDY)
        _adopt(output, [cell])
    else:
        write_report(output / "cells" / cell.name, outcome.report, force=True)
        failed.unlink(missing_ok=True)
        partial_file(output, cell).unlink(missing_ok=True)


def read_states(output: Path, cells: Sequence[Cell]) -> list[CellState]:
    """What the folder says of each cell."""
    return [_state(output, cell) for cell in cells]


def states_markdown(states: Sequence[CellState]) -> str:
    """One row for each cell, with its state, noise and figures."""
    numbers = [headlines(one.report) if one.report else {} for one in states]
    columns = shown(numbers)
    header = ("workload", "bundle", "device", "setting", "state", "noise", *(HEADLINES[name].title for name in columns))
    rows = []
    for one, values in zip(states, numbers, strict=True):
        cell = one.cell
        noisy = "" if one.report is None else "noisy" if noise(one.report) else "quiet"
        words = (Path(cell.workload).stem, cell.bundle.name, cell.device_name, cell.setting.name, one.state, noisy)
        row = (*words, *(headline_cell(name, values.get(name)) for name in columns))
        rows.append([" ".join(text.split()).replace("|", "/") for text in row])
    remarks = [f"- {one.cell.title}: {one.state}, {one.reason}" for one in states if one.reason]
    table = markdown_table(header, rows, left=range(6))
    return "\n\n".join([table, *(["\n".join(remarks)] if remarks else [])]) + "\n"


def _state(output: Path, cell: Cell) -> CellState:
    report = _report(output / "cells" / cell.name / "report.json")
    if report is not None and report.stopped is None:
        return CellState(cell, "done", None, report)
    failed = _failed_file(output, cell)
    if failed.is_file():
        return CellState(cell, "failed", _reason(failed), report)
    if report is not None:
        return CellState(cell, "partial", report.stopped, report)
    return CellState(cell, "waiting")


def _reason(path: Path) -> str:
    """One that cannot be read stops no lab: its cell is tried again in any case."""
    try:
        record = read_json_object(path, limit=2**20, error=BundleError, remedy="Measure again")
    except BundleError:
        return "why cannot be read any more"
    return str(record.get("reason"))


def _report(path: Path) -> Report | None:
    """None where there is none, or one that a crash left unreadable: its cell is then measured again."""
    try:
        return read_report(path) if path.is_file() else None
    except BundleError:
        return None


def _adopt(output: Path, cells: Sequence[Cell]) -> None:
    """Unfinished reports that a crash or Ctrl-C left become their cells' reports, marked as stopped."""
    for cell in cells:
        partial = partial_file(output, cell)
        if partial.is_file():
            report = _report(partial)
            whole = _report(output / "cells" / cell.name / "report.json")
            if report is not None and (whole is None or whole.stopped is not None):  # else a crash left the file late
                write_report(output / "cells" / cell.name, report, force=True)
            partial.unlink(missing_ok=True)


def _failed_file(output: Path, cell: Cell) -> Path:
    return output / "cells" / f"{cell.name}.failed.json"


def _sentence(one: CellState) -> str:
    if one.report is None or one.state == "failed":
        return f"{one.state}: {one.reason}"
    noisy = noise(one.report)
    words = f"{one.state}, {one.report.seconds:.0f} s, {f'noisy: {noisy}' if noisy else 'quiet'}"
    return f"{words} ({one.reason})" if one.reason else words


def _write_tables(output: Path, lab: Lab, states: Sequence[CellState]) -> None:
    record = {"format": 1, "lab": lab.model_dump(mode="json"), "cells": [one.as_json() for one in states]}
    replace_file(output / "lab.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode(), REMEDY)
    reports = [(one.cell.title, one.report) for one in states if one.report is not None]
    replace_file(output / "table.csv", as_csv(reports).encode(), REMEDY)
    replace_file(output / "table.md", states_markdown(states).encode(), REMEDY)
