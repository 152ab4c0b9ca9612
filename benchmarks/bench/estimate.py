"""How long a workload takes on this machine: as long as it took before, or what a quick measurement suggests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgephi.benchmarks.bench.assemble import bundle_facts
from edgephi.benchmarks.bench.cases import Case, plan
from edgephi.benchmarks.bench.report.history import read_history
from edgephi.benchmarks.bench.results import Machine, Report
from edgephi.benchmarks.bench.run import prompts_of
from edgephi.benchmarks.bench.workload import Workload
from edgephi.benchmarks.report import machine
from edgephi.bundle import read_manifest
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import Sampling, chooser

PROMPT, NEW = 128, 8
"""Tokens of the quick measurement."""
BESIDES_S = 10.0
"""The machine's limits, measured before and after, and the quality contract."""


@dataclass(frozen=True)
class Speed:
    """What a quick measurement found, in seconds."""

    load_s: float
    prompt_token_s: float
    new_token_s: float


@dataclass(frozen=True)
class Asked:
    """What a workload asks of a bundle, and how long that takes."""

    cases: int
    loads: int
    prompt_tokens: int
    """Of all repetitions and warm-ups, those that only fill the KV cache included."""
    new_tokens: int
    refused: int
    """Cases that do not fit the model's context."""
    seconds: float
    measured: str | None
    """When it was run before, for so many seconds; None: estimated from a quick measurement, which takes a long context
    to be as fast as a short one and the machine to be as busy as it was."""


def quick_speed(folder: Path, device: str) -> Speed:
    """Load a bundle, then compute a prompt and decode a few tokens twice; the second time counts.

    Raises:
        EdgephiError: it cannot be run.
    """
    began = time.monotonic()
    with load(folder, device) as model:
        load_s = time.monotonic() - began
        prompt = max(1, min(PROMPT, model.context_length - NEW))
        _once(model, prompt)
        prompt_s, new_s = _once(model, prompt)
    return Speed(load_s, prompt_s / prompt, new_s / (NEW - 1))


def _once(model: Model, prompt: int) -> tuple[float, float]:
    """Seconds until the first new token, and from there to the last."""
    choose = chooser(Sampling())
    sequence = model.open_sequence(prompt + NEW)
    try:
        began = time.monotonic()
        sequence.prefill([0] * prompt, lambda: False)
        sequence.step(choose)
        first = time.monotonic()
        for _ in range(NEW - 1):
            sequence.step(choose)
        return first - began, time.monotonic() - first
    finally:
        sequence.close()


def ask(folder: Path, workloads: Sequence[Workload], device: str = "auto") -> list[Asked]:
    """What each workload asks of a bundle here. A quick measurement is made only where the history does not say.

    Raises:
        EdgephiError: the bundle cannot be run.
    """
    manifest = read_manifest(folder)
    prompts = prompts_of(folder, manifest, device)
    history = read_history(bundle_facts(folder, manifest).sha256, Machine(**machine())).reports
    before = {report.workload.sha256: report for report in history if report.device == device and not report.stopped}
    speed = None
    if any(workload.sha256 not in before for workload in workloads):
        speed = quick_speed(folder, device)
    found = []
    for workload in workloads:
        cases, refused = plan(workload, prompts)
        found.append(asked(workload, cases, len(refused), speed, before.get(workload.sha256)))
    return found


def asked(workload: Workload, cases: Sequence[Case], refused: int, speed: Speed | None, before: Report | None) -> Asked:
    """Count what a workload asks.

    Args:
        before: the last whole run of it.
        speed: needed without one.
    """
    method, loading = workload.content.method, workload.content.load
    runs = method.warmups + method.repetitions
    loads = loading.repetitions * (2 * loading.warm + loading.cold) + loading.warm if loading else 0
    prompt = runs * sum(len(case.depth_ids) + len(case.prompt_ids) for case in cases)
    new = runs * sum(case.new_tokens for case in cases)
    if before is not None:
        seconds = before.seconds
    else:
        assert speed is not None
        seconds = prompt * speed.prompt_token_s + new * speed.new_token_s + runs * len(cases) * method.pause_s
        seconds += (loads + 1) * speed.load_s + BESIDES_S
    return Asked(len(cases), loads, prompt, new, refused, seconds, before.created if before else None)
