"""Load time, cold and warm, and the memory a loaded bundle takes; every run is a process of its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edgephi.benchmarks.bench.results import CaseResult, Metric, figure
from edgephi.benchmarks.bench.workload import Loading
from edgephi.errors import EngineError

COST = 4000
"""Of one load, in the unit of `Case.cost`."""

Probe = Callable[[str], dict[str, float | None]]
"""'time' or 'memory' → what `load_probe` prints."""

MEMORY: tuple[tuple[str, Metric], ...] = (
    ("steady_private", "steady_private_bytes"),
    ("steady_file", "steady_file_bytes"),
    ("peak_private", "peak_private_bytes"),
    ("peak_resident", "peak_resident_bytes"),
)


def planned_cost(loading: Loading) -> int:
    """What `measure_loading` will report through `advance` in all."""
    return COST * ((loading.repetitions + 2) * loading.warm + loading.repetitions * loading.cold)


def measure_loading(
    files: Sequence[Path],
    loading: Loading,
    probe: Probe,
    *,
    advance: Callable[[int], None] = lambda cost: None,
    drop: Callable[[Sequence[Path]], str | None] | None = None,
) -> list[CaseResult]:
    """Cold loads, then warm ones, then one that is weighed.

    Nothing may have the files open or mapped meanwhile: mapped pages cannot be dropped.

    Args:
        files: of the bundle.
        drop: empties the file cache of them; returns why it could not, or None. Default: `drop_from_file_cache`.
    """
    drop = drop or drop_from_file_cache
    found: list[CaseResult] = []
    if loading.cold:
        found.append(_cold(files, loading.repetitions, probe, advance, drop))
    if loading.warm:
        probe("time")
        advance(COST)
        runs = []
        for _ in range(loading.repetitions):
            runs.append(probe("time"))
            advance(COST)
        values = _times(runs)
        weight = probe("memory")
        advance(COST)
        values |= {metric: [float(size)] for key, metric in MEMORY if (size := weight[key]) is not None}
        found.append(_result("load, warm", values, None))
    return found


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

    POSIX_FADV_DONTNEED is advice, so a few pages of every file are asked for without waiting (preadv2 with RWF_NOWAIT):
    a page that comes at once was still cached. Caches below this system (a hypervisor's, the disk's own) remain.
    """
    if sys.platform != "linux":
        return "this system does not let a program empty the file cache"
    for path in files:
        with path.open("rb") as stream:
            descriptor = stream.fileno()
            os.fsync(descriptor)  # dirty pages are not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(descriptor).st_size
            for offset in range(0, size, max(4096, size // 8)):
                try:
                    cached = os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
                except OSError as error:
                    if error.errno == errno.EAGAIN:
                        continue
                    return "this file system does not tell what it has cached"
                if cached:
                    return "the file cache kept pages of the bundle"
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # asking may have started a read
    return None


def _cold(
    files: Sequence[Path],
    repetitions: int,
    probe: Probe,
    advance: Callable[[int], None],
    drop: Callable[[Sequence[Path]], str | None],
) -> CaseResult:
    runs = []
    for done in range(repetitions):
        reason = drop(files)
        if reason is not None:
            advance(COST * (repetitions - done))
            return _result("load, cold", {}, reason)
        runs.append(probe("time"))
        advance(COST)
    return _result("load, cold", _times(runs), None)


def _times(runs: Sequence[dict[str, float | None]]) -> dict[Metric, list[float]]:
    return {
        "load_s": [float(run["load_s"] or 0.0) for run in runs],
        "load_to_first_token_s": [float(run["first_token_s"] or 0.0) for run in runs],
    }


def _result(name: str, values: dict[Metric, list[float]], reason: str | None) -> CaseResult:
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
        figures={metric: figure(found) for metric, found in values.items()},
    )
