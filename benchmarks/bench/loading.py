"""Load time, cold and warm, and the memory a loaded bundle takes; every run is a process of its own."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgephi.benchmarks.bench.results import CaseResult, Metric, figure
from edgephi.benchmarks.bench.workload import Loading, Method
from edgephi.errors import EngineError

COST = 4000
"""Of one load, in the unit of `Case.cost`."""

Probe = Callable[[str], dict[str, float | None]]
"""'time' or 'memory' → what `load_probe` prints."""

Drop = Callable[[Sequence[Path]], str | None]

TIMES: tuple[tuple[str, Metric], ...] = (("load_s", "load_s"), ("first_token_s", "load_to_first_token_s"))
MEMORY: tuple[tuple[str, Metric], ...] = (
    ("steady_private", "steady_private_bytes"),
    ("steady_file", "steady_file_bytes"),
    ("peak_private", "peak_private_bytes"),
    ("peak_resident", "peak_resident_bytes"),
)


@dataclass
class _Runs:
    """Repetitions of one kind of load."""

    values: dict[Metric, list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)
    repeated: int = 0
    noisy: bool = False
    reason: str | None = None
    """Why there are none."""


def planned_cost(loading: Loading) -> int:
    """What `measure_loading` will report through `advance` in all."""
    return COST * ((2 * loading.repetitions + 1) * loading.warm + loading.repetitions * loading.cold)


def measure_loading(
    files: Sequence[Path],
    loading: Loading,
    method: Method,
    probe: Probe,
    *,
    advance: Callable[[int], None] = lambda cost: None,
    before: Callable[[], None] = lambda: None,
    into: list[CaseResult] | None = None,
    drop: Drop | None = None,
) -> list[CaseResult]:
    """Cold loads; then warm ones, timed and weighed in turn. One that other processes disturbed is timed again.

    Nothing may have the files open or mapped meanwhile: mapped pages cannot be dropped.

    Args:
        files: of the bundle.
        before: called before every load that is counted.
        into: filled also when `before` or a probe raises, with what was measured until then.
        drop: empties the file cache of them; returns why it could not, or None. Default: `drop_from_file_cache`.
    """
    found = [] if into is None else into
    if loading.cold:
        with _kept("load, cold", found) as runs:
            _cold(runs, files, loading.repetitions, method, probe, advance, before, drop or drop_from_file_cache)
    if loading.warm:
        with _kept("load, warm", found) as runs:
            probe("time")
            advance(COST)
            for _ in range(loading.repetitions):
                before()
                _time(runs, probe, method, loading.repetitions)
                weight = probe("memory")
                for key, metric in MEMORY:
                    size = weight[key]
                    if size is not None:
                        runs.values.setdefault(metric, []).append(size)
                advance(2 * COST)
    return found


@contextmanager
def _kept(name: str, found: list[CaseResult]) -> Iterator[_Runs]:
    """Yields the repetitions to fill; their result joins `found` whether the block ends or raises."""
    runs = _Runs()
    try:
        yield runs
    finally:
        if runs.reason is None and not runs.values:
            runs.reason = "the run stopped before it"
        found.append(
            load_case(
                name,
                runs.values,
                reason=runs.reason,
                noisy=runs.noisy,
                repeated=runs.repeated,
                others_cpu_share=max(runs.others, default=None),
            )
        )


def load_case(
    name: str,
    values: Mapping[Metric, list[float]],
    *,
    reason: str | None = None,
    noisy: bool = False,
    repeated: int = 0,
    others_cpu_share: float | None = None,
) -> CaseResult:
    """The row of a report about loads of one kind; one without values was not measured."""
    return CaseResult(
        name=name,
        group="load",
        category="load",
        depth=0,
        prompt_tokens=0,
        new_tokens=0,
        templated=False,
        prompt_sha256=None,
        tokens_sha256=None,
        state="measured" if values else "not measured",
        reason=reason,
        noisy=noisy,
        repeated=repeated,
        others_cpu_share=others_cpu_share,
        figures={metric: figure(found) for metric, found in values.items()},
    )


def process_probe(folder: Path, device: str) -> Probe:
    """A probe that starts `load_probe`.

    Raises (when called):
        EngineError: the bundle does not load; what was said is in it.
    """

    def probe(what: str) -> dict[str, float | None]:
        command = [sys.executable, "-m", "edgephi.benchmarks.bench.load_probe", str(folder), device, what]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise EngineError(
                f"loading in a process of its own failed: {said}",
                where=folder,
                remedy="Check the bundle with `edgephi verify`",
            )
        found: dict[str, float | None] = json.loads(done.stdout)
        return found

    return probe


def drop_from_file_cache(files: Sequence[Path]) -> str | None:
    """Make the next reading of the files come from the disk; why that failed, or None.

    POSIX_FADV_DONTNEED is advice, so the kernel is asked afterwards what it kept. Caches below this system (a
    hypervisor's, the disk's own) remain.
    """
    if sys.platform != "linux":
        return "this system does not let a program empty the file cache"
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # dirty pages are not dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        share = cached_share(path)
        if share > 0.01:
            return f"the file cache kept {100 * share:.0f} % of {path.name}"
    return None


def cached_share(path: Path) -> float:
    """Share of a file's pages that are in memory (mincore, which reads nothing itself; Linux).

    The kernel claims that all are when the file belongs to somebody else.
    """
    size = path.stat().st_size
    if not size:
        return 0.0
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        del first  # a map that is referred to cannot be closed
    return 1.0 if failed else float((np.frombuffer(bytes(pages), np.uint8) & 1).mean())


def _cold(
    runs: _Runs,
    files: Sequence[Path],
    repetitions: int,
    method: Method,
    probe: Probe,
    advance: Callable[[int], None],
    before: Callable[[], None],
    drop: Drop,
) -> None:
    def cold(what: str) -> dict[str, float | None]:
        runs.reason = runs.reason or drop(files)
        return {} if runs.reason else probe(what)

    for _ in range(repetitions):
        before()
        if runs.reason is None:
            _time(runs, cold, method, repetitions)
        advance(COST)
    if runs.reason is not None:
        runs.values, runs.others, runs.repeated, runs.noisy = {}, [], 0, False


def _time(runs: _Runs, probe: Probe, method: Method, repetitions: int) -> None:
    """Add one timed load, undisturbed if a bounded number of attempts gives one."""
    left = min(method.noisy_repeats, repetitions // 2 - runs.repeated)
    attempts = [probe("time")]
    while _others(attempts[-1]) > method.others_cpu_limit and len(attempts) <= left:
        attempts.append(probe("time"))
    best = min(attempts, key=_others)
    runs.repeated += len(attempts) - 1
    runs.noisy |= _others(best) > method.others_cpu_limit
    runs.others.append(_others(best))
    for key, metric in TIMES:
        if (seconds := best.get(key)) is not None:
            runs.values.setdefault(metric, []).append(seconds)


def _others(run: dict[str, float | None]) -> float:
    return run.get("others_share") or 0.0
