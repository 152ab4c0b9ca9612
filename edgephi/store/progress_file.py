"""Who pulls a model at this moment, and how far it is: other processes read it from a file beside the lock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from edgephi.errors import OutputError
from edgephi.files import read_file
from edgephi.lock import locked
from edgephi.records import Strict
from edgephi.store.phases import Readiness, ReadyState
from edgephi.store.places import make_folders, state_folder, unusable

WRITE_EVERY_S = 0.5
LIMIT = 2**14


@dataclass(frozen=True)
class Pulling:
    """A pull that is running."""

    process: int
    readiness: Readiness


class _Record(Strict):
    """The content of the file."""

    process: int = Field(gt=0, lt=2**31)
    started: float
    readiness: Readiness


class ProgressFile:
    """Written by the one that pulls, at most every `WRITE_EVERY_S`; removed at the end."""

    def __init__(self, name: str) -> None:
        self._path, self._written = _path(name), 0.0
        self._state: ReadyState | None = None

    def write(self, readiness: Readiness) -> None:
        """A disk that is full must not end a pull for this file's sake."""
        now = time.monotonic()
        if readiness.state is self._state and now - self._written < WRITE_EVERY_S:
            return
        self._state, self._written = readiness.state, now
        record = {"process": os.getpid(), "started": _started(os.getpid()), "readiness": asdict(readiness)}
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}.new")
        with suppress(OSError):
            beside.write_text(json.dumps(record), encoding="utf-8")
            beside.replace(self._path)

    def close(self) -> None:
        with suppress(OSError):
            self._path.unlink()


def running(name: str) -> Pulling | None:
    """The pull of a model that is running in this process or another; None: there is none."""
    try:
        record = _Record.model_validate_json(
            read_file(_path(name), limit=LIMIT, error=OutputError, remedy="Remove it"), strict=False
        )
    except (OutputError, ValidationError):
        return None
    if record.started != _started(record.process):  # it was killed, and left the file
        return None
    return Pulling(record.process, record.readiness)


@contextmanager
def held_by(name: str, pull: Pulling | None) -> Iterator[None]:
    """Hold the lock on a model of the store.

    Args:
        pull: what is running, for the sentence.

    Raises:
        OutputError: somebody else pulls or removes it.
    """

    def busy(holder: str, path: Path) -> OutputError:
        at = f" ({pull.readiness.state})" if pull is not None else ""
        return OutputError(
            f"another edgephi{holder} is at work on {name}{at}",
            where=path,
            remedy="Wait until it ends; `edgephi list` shows the model then",
        )

    make_folders()
    with ExitStack() as held:
        try:
            held.enter_context(locked(state_folder() / f"{name}.lock", busy))
        except OSError as problem:
            raise unusable(problem, state_folder()) from problem
        yield


def _path(name: str) -> Path:
    return state_folder() / f"{name}.progress"


def _started(process: int) -> float | None:
    """When a process began: its number may be given again. None: there is no such process."""
    import psutil

    try:
        return round(psutil.Process(process).create_time(), 2)
    except psutil.Error:
        return None
