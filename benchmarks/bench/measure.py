"""One repetition of a case, on the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from edgephi.benchmarks.bench.cases import Case
from edgephi.benchmarks.bench.meters.usage import Usage, read_usage
from edgephi.benchmarks.bench.results import Metric
from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.sampling import Sampling, chooser

Joules = Callable[[], float]
"""A meter: joules since some moment, never falling."""


@dataclass(frozen=True)
class Sample:
    """What one repetition took. Times in seconds."""

    tokens: tuple[int, ...]
    """Generated."""
    first_token_s: float
    """From the first token of the prompt to the choice of the first new one; tokenizing is not included."""
    intervals_s: tuple[float, ...]
    """Between a new token and the next."""
    own_cpu_s: float
    others_cpu_share: float
    """Processor time of other processes over all that there was."""
    cpu_share: float
    """Processor time of this process over all that there was."""
    prompt_j: float | None = None
    """Energy up to the first new token, idle included."""
    decode_j: float | None = None

    @property
    def seconds(self) -> float:
        return self.first_token_s + sum(self.intervals_s)


@dataclass(frozen=True)
class Instruments:
    """Clock (ns) and meters; tests bring their own."""

    clock: Callable[[], int] = perf_counter_ns
    usage: Callable[[], Usage] = read_usage
    joules: Joules | None = None


@dataclass(frozen=True)
class Marks:
    """Readings of the instruments at one moment."""

    ns: int
    usage: Usage
    joules: float | None


def mark(instruments: Instruments) -> Marks:
    """Read all instruments; the clock is nearest to what follows."""
    usage, joules = instruments.usage(), instruments.joules() if instruments.joules else None
    return Marks(instruments.clock(), usage, joules)


def measure(open_sequence: Callable[[int], KvSequence], case: Case, instruments: Instruments) -> Sample:
    """Run a case once, greedily, from an empty cache.

    Args:
        open_sequence: makes a sequence whose cache holds that many tokens.

    Raises:
        EngineError: the runtime fails.
        PromptError: an id is outside the vocabulary.
    """
    choose, clock = chooser(Sampling()), instruments.clock
    sequence = open_sequence(case.length)
    try:
        if case.depth_ids:
            sequence.prefill(case.depth_ids, lambda: False)
        start = mark(instruments)
        sequence.prefill(case.prompt_ids, lambda: False)
        tokens = [sequence.step(choose)]
        times = [clock()]
        joules = instruments.joules() if instruments.joules else None
        while len(tokens) < case.new_tokens and tokens[-1] not in case.stop_ids:
            tokens.append(sequence.step(choose))
            times.append(clock())
        return sample(tokens, times, start, joules, mark(instruments))
    finally:
        sequence.close()


def sample(tokens: list[int], times_ns: list[int], start: Marks, first_j: float | None, end: Marks) -> Sample:
    """Readings become a sample.

    Args:
        times_ns: when each token was there.
        first_j: the meter's reading when the first was.
    """
    spent = end.usage.since(start.usage)
    prompt_j = decode_j = None
    if start.joules is not None and first_j is not None and end.joules is not None:
        prompt_j, decode_j = first_j - start.joules, end.joules - first_j
    return Sample(
        tokens=tuple(tokens),
        first_token_s=(times_ns[0] - start.ns) / 1e9,
        intervals_s=tuple((np.diff(times_ns) / 1e9).tolist()),
        own_cpu_s=spent.own_s,
        others_cpu_share=spent.others_share,
        cpu_share=spent.own_share,
        prompt_j=prompt_j,
        decode_j=decode_j,
    )


def metrics(case: Case, one: Sample, idle_w: float | None) -> dict[Metric, float]:
    """The figures one repetition gives. Idle power times duration is subtracted from energies.

    Percentiles are of this repetition's intervals between tokens, linearly interpolated.
    """
    found: dict[Metric, float] = {"cpu_share": one.cpu_share}
    if case.group in ("prefill", "answer", "speculation"):
        found["time_to_first_token_s"] = one.first_token_s
        found["prefill_tokens_per_s"] = len(case.prompt_ids) / one.first_token_s
        if one.prompt_j is not None and idle_w is not None:
            found["energy_per_prompt_j"] = one.prompt_j - idle_w * one.first_token_s
    if one.intervals_s:
        total = sum(one.intervals_s)
        found["decode_tokens_per_s"] = len(one.intervals_s) / total
        p50, p95, p99 = (float(q) for q in np.percentile(one.intervals_s, (50, 95, 99)))
        found |= {"inter_token_p50_s": p50, "inter_token_p95_s": p95, "inter_token_p99_s": p99}
        if one.decode_j is not None and idle_w is not None:
            found["energy_per_token_j"] = (one.decode_j - idle_w * total) / len(one.intervals_s)
    return found
