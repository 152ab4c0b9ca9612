"""Many mutated inputs: workers are fed, watched for time and memory, and replaced when an input ends them."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, get_args

import psutil

from edgephi.child import exit_reason
from tests.fuzz.cases import Kind, make_case
from tests.fuzz.targets import Outcome

PROJECT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 20.0
MEMORY = 2 * 2**30
WARM_UP_S = 30.0
"""More to begin with: a worker imports everything, and makes the input."""
WORN_OUT = 700 * 2**20
"""Memory between two inputs at which a worker is replaced: the next input would be blamed for it."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FINE = ("refused", "accepted")


@dataclass(frozen=True)
class Record:
    """One input and how it fared."""

    kind: Kind
    seed: int
    outcome: Outcome
    step: str
    what: str
    trace: str
    notes: tuple[str, ...]
    seconds: float
    peak: int
    """Bytes of the worker and its children, at most."""


class _Worker:
    """A process of `tests.fuzz.worker`, and a thread that reads its answers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT,
            text=True,
            encoding="utf-8",
        )
        self._lines: queue.Queue[str] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put("")

    def run(self, kind: Kind, seed: int, timeout_s: float) -> Record:
        """Give it an input; afterwards it may be dead, see `alive`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"kind": kind, "seed": seed}) + "\n")
        self._process.stdin.flush()
        started, peak, step = time.monotonic(), 0, ""

        def ended(outcome: Outcome, what: str) -> Record:
            notes = make_case(kind, seed).notes
            return Record(kind, seed, outcome, step, what, "", notes, time.monotonic() - started, peak)

        while True:
            try:
                line = self._lines.get(timeout=0.05)
            except queue.Empty:
                peak = max(peak, _memory(self._process.pid))
                if peak > MEMORY or time.monotonic() - started > timeout_s + (0 if step else WARM_UP_S):
                    self.close()
                    return ended("over memory" if peak > MEMORY else "hung", "")
                continue
            if not line:
                return ended("unexpected", f"the process died: {exit_reason(self._process.wait())}")
            said = json.loads(line)
            if "result" in said:
                break
            if not step:  # until now the input was made, and that is not what is measured
                started, peak = time.monotonic(), 0
            step = said["step"]
        answer = said["result"]
        peak = max(peak, answer.pop("peak") or 0)
        answer["notes"] = tuple(answer["notes"])
        record = Record(kind, seed, **answer, peak=peak)
        if peak > MEMORY:
            record = Record(**(asdict(record) | {"outcome": "over memory"}))
        if _memory(self._process.pid) > WORN_OUT:
            self.close()
        return record

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it and every process it started."""
        with suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
        self._process.kill()
        self._process.wait()


def _memory(pid: int) -> int:
    """Bytes a process and its children have in memory."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def run(
    kind: Kind,
    seeds: Iterable[int],
    *,
    parallel: int = 2,
    timeout_s: float = TIMEOUT_S,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Run mutated inputs of a kind; records in the order of the seeds."""
    waiting = iter(list(seeds))
    records: list[Record] = []
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        worker: _Worker | None = None
        try:
            while True:
                with lock:
                    seed = next(waiting, None)
                if seed is None:
                    break
                if worker is None or not worker.alive:
                    worker = _Worker()
                record = worker.run(kind, seed, timeout_s)
                with lock:
                    records.append(record)
                    on_record(record)
        except BaseException as error:
            failures.append(error)
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(parallel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sorted(records, key=lambda record: record.seed)


def table(records: Sequence[Record]) -> str:
    """Outcomes by kind, as Markdown."""
    lines = [
        "| kind | mutations | " + " | ".join(OUTCOMES) + " | peak MB | slowest s |",
        "|---" * (len(OUTCOMES) + 4) + "|",
    ]
    for kind in dict.fromkeys(record.kind for record in records):
        these = [record for record in records if record.kind == kind]
        counts = Counter(record.outcome for record in these)
        cells = [kind, len(these), *(counts[outcome] for outcome in OUTCOMES)]
        cells += [max(record.peak for record in these) >> 20, f"{max(record.seconds for record in these):.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def causes(records: Sequence[Record]) -> list[str]:
    """Every way in which inputs failed, the most frequent first, each with one input to try."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record.outcome not in FINE:
            frames = [line.strip() for line in record.trace.splitlines() if line.strip().startswith("File ")]
            key = (record.outcome, record.step, record.what.split(":")[0], frames[-1] if frames else record.what[:80])
            groups.setdefault(key, []).append(record)
    lines = []
    for (outcome, step, *_), group in sorted(groups.items(), key=lambda item: -len(item[1])):
        one = min(group, key=lambda record: len(record.notes))
        frames = [line.strip() for line in one.trace.splitlines() if line.strip().startswith("File ")]
        lines.append(
            f"{len(group)} x {outcome} in {step or '?'} ({one.kind} {one.seed}: {'; '.join(one.notes)[:160]!a}): "
            f"{one.what[:200]!a} {frames[-1] if frames else ''}"
        )
    return lines
