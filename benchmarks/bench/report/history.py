"""Reports over time: one JSON document a line, so that a slowdown after an update of a driver or runtime shows."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from edgephi.benchmarks.bench.results import Machine, Report
from edgephi.devices.cache import own_folder
from edgephi.errors import BundleError, OutputError

HISTORY_LIMIT = 256 * 2**20


@dataclass(frozen=True)
class History:
    """What was kept, the oldest first."""

    reports: tuple[Report, ...]
    damaged: int
    """Lines that could not be read."""


def history_file() -> Path:
    """Where runs are kept: EDGEPHI_HISTORY, or bench.jsonl in the user's data folder."""
    import platformdirs

    named = os.environ.get("EDGEPHI_HISTORY")
    if named:
        return Path(named)
    return own_folder(platformdirs.user_data_path("edgephi", appauthor=False), "EDGEPHI_HISTORY") / "bench.jsonl"


def machine_key(machine: Machine) -> str:
    """SHA-256 of processor, cores and memory. Versions of system, drivers and Python may change: that is the point."""
    facts = [machine.cpu, machine.cores, machine.memory]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def append(report: Report, path: Path | None = None) -> None:
    """Add a line, in one write. A line that an earlier crash left unfinished is closed first.

    Raises:
        OutputError: the file cannot be written.
    """
    path = path or history_file()
    line = json.dumps(report.model_dump(mode="json"), ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else b"\n" + line
            stream.write(line)
    except OSError as error:
        raise OutputError(
            f"the history cannot be written: {error.strerror or error}",
            where=path,
            remedy="Name another file in EDGEPHI_HISTORY, or pass --no-record",
        ) from error


def read_history(bundle_sha256: str | None, machine: Machine | None, path: Path | None = None) -> History:
    """Reports of a bundle on a machine.

    Args:
        bundle_sha256: `BundleFacts.sha256`; None: of every bundle.
        machine: None: of every machine.

    Raises:
        BundleError: the file cannot be read or is implausibly large.
    """
    path = path or history_file()
    found, damaged = [], 0
    try:
        if path.is_file() and path.stat().st_size > HISTORY_LIMIT:
            raise BundleError("the history is implausibly large", where=path, remedy="Move the file away")
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError as error:
        raise BundleError(
            f"the history cannot be read: {error.strerror or error}", where=path, remedy="Make the file readable"
        ) from error
    for line in lines:
        if not line:
            continue
        try:
            report = Report.model_validate_json(line)
        except ValidationError:
            damaged += 1
            continue
        here = machine is None or machine_key(report.machine) == machine_key(machine)
        if here and bundle_sha256 in (None, report.bundle.sha256):
            found.append(report)
    return History(tuple(sorted(found, key=lambda report: report.created)), damaged)
