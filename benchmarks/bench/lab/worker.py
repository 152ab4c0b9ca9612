"""The side of a `dask worker`: one cell, measured in a process of its own."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgephi.benchmarks.bench.lab.execute import MEASURE
from edgephi.benchmarks.cluster.worker import answer, check_versions, checked_bundle, in_child

_partial: dict[str, Path] = {}
"""Where the cell that is measured keeps what is known, by its name."""


def measure_cell(order: dict[str, Any]) -> dict[str, Any]:
    """Measure one cell on this worker.

    Args:
        order: name; arguments (of `execute.measure`, without bundle, workload and partial); bundle (its folder here)
            and its sha256; workload (files by path, the TOML file first); versions (of `RUNTIME`).

    Returns:
        `report`, or `reason` why there is none.
    """
    return answer(lambda: _measured(order))


def _measured(order: dict[str, Any]) -> dict[str, Any]:
    with TemporaryDirectory(prefix="edgephi-lab-") as scratch:
        try:
            folder = checked_bundle(order["bundle"], order["sha256"])
            check_versions(order["versions"])
            workload = _written(order["workload"], Path(scratch))
            _partial[order["name"]] = partial = Path(scratch) / "partial.json"
            arguments = {**order["arguments"], "bundle": str(folder), "workload": str(workload)}
            arguments["partial"] = str(partial)
            return {"report": in_child(MEASURE, arguments, order["arguments"]["label"])}
        finally:
            _partial.pop(order["name"], None)


def unfinished() -> dict[str, str]:
    """What is known of the cell that is measured here: its report as JSON, by the cell's name."""
    found = {}
    for name, file in list(_partial.items()):
        with suppress(OSError):  # nothing is known yet, or the cell ended in between
            found[name] = file.read_text(encoding="utf-8")
    return found


def _written(files: dict[str, bytes], folder: Path) -> Path:
    paths = [folder / "workload" / name for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return paths[0]
