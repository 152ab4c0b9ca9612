"""The order of runs, and which of them count.

Every case is warmed up; then come rounds in which every case runs once, in an order drawn anew, so that a machine that
grows warm or busy does so for all cases alike. A run during which other processes were busy is done again, and the
quietest attempt counts; there are at most half as many of these as planned runs. A run whose tokens are not those of
the warm-up makes the case worthless.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgephi.benchmarks.bench.cases import Case, digest
from edgephi.benchmarks.bench.measure import Sample, metrics
from edgephi.benchmarks.bench.pace import TimeLeft
from edgephi.benchmarks.bench.results import CaseResult, Metric, figure
from edgephi.benchmarks.bench.workload import Method

Run = Callable[[Case], Sample]
Advance = Callable[[int], None]

SHORTEST_JUDGED_S = 0.2
"""Shares of the processors are counted in ticks of 10 to 16 ms: a shorter run cannot be called disturbed."""


@dataclass
class Tally:
    """What is known of a case so far."""

    reference: tuple[int, ...] = ()
    counted: list[Sample] = field(default_factory=list)
    repeated: int = 0
    noisy: bool = False
    wrong: int = 0


def planned_cost(cases: Sequence[Case], method: Method) -> int:
    """What `run_cases` will report through `advance` in all, unless runs are done again."""
    return sum(case.cost for case in cases) * (method.warmups + method.repetitions)


def run_cases(
    cases: Sequence[Case],
    run: Run,
    method: Method,
    *,
    tallies: list[Tally] | None = None,
    advance: Advance = lambda cost: None,
    before: Callable[[], None] = lambda: None,
    after_round: Callable[[], None] = lambda: None,
    left: TimeLeft | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[Tally]:
    """Warm up, the case with most to do first; then run the rounds; one tally a case.

    Args:
        tallies: filled as runs are done, so that they are there when `run` or `before` raises.
        advance: told the cost of every run that is done, repeated ones apart.
        before: called before every run.
        left: told what runs took, by `clock` (s).
        sleep: pauses, seconds.
    """
    order = random.Random(method.seed)
    tallies = [Tally() for _ in cases] if tallies is None else tallies
    spent = 0.0

    def timed(case: Case) -> Sample:
        nonlocal spent
        began = clock()
        one = run(case)
        spent += clock() - began
        return one

    def ran(index: int, one: Sample) -> None:
        nonlocal spent
        if left is not None:
            left.ran(index, spent, sum(one.intervals_s))
        spent = 0.0
        advance(cases[index].cost)

    by_cost = sorted(range(len(cases)), key=lambda index: -cases[index].cost)
    for _ in range(method.warmups):
        for index in by_cost:
            before()
            tally, one = tallies[index], timed(cases[index])
            tally.reference = tally.reference or one.tokens
            tally.wrong += one.tokens != tally.reference
            ran(index, one)
            sleep(method.pause_s)
    repeats_left = method.repetitions * len(cases) // 2
    for _ in range(method.repetitions):
        for index in order.sample(range(len(cases)), len(cases)):
            before()
            repeats = min(repeats_left, method.noisy_repeats)
            repeats_left -= _count(cases[index], tallies[index], timed, method, repeats, sleep)
            ran(index, tallies[index].counted[-1])
        after_round()
    return tallies


def _count(case: Case, tally: Tally, run: Run, method: Method, repeats: int, sleep: Callable[[float], None]) -> int:
    """Run a case until it is undisturbed, `repeats` times more at most; how many more it were."""
    attempts: list[Sample] = []
    while not attempts or (disturbed(attempts[-1], method) and len(attempts) <= repeats):
        attempts.append(run(case))
        tally.wrong += attempts[-1].tokens != tally.reference
        sleep(method.pause_s)
    best = min(attempts, key=lambda attempt: attempt.others_cpu_share if disturbed(attempt, method) else 0.0)
    tally.counted.append(best)
    tally.repeated += len(attempts) - 1
    tally.noisy |= disturbed(best, method)
    return len(attempts) - 1


def disturbed(sample: Sample, method: Method) -> bool:
    """Whether other processes had more of the processors than the method allows."""
    return sample.seconds >= SHORTEST_JUDGED_S and sample.others_cpu_share > method.others_cpu_limit


def result(case: Case, tally: Tally, idle_w: float | None, resolution_j: float | None) -> CaseResult:
    """A tally as the report has it.

    Args:
        idle_w: subtracted from energies; None: none were measured.
        resolution_j: of the meter. Energies that are not well above it are left out.
    """
    if not tally.counted:
        return described(case, "the run stopped before it")
    facts = described(case)
    if tally.wrong:
        runs = len(tally.counted) + tally.repeated
        reason = f"{tally.wrong} of {runs} runs gave other tokens than the first"
        return facts.model_copy(update={"state": "wrong answers", "reason": reason})
    values: dict[Metric, list[float]] = {}
    for one in tally.counted:
        for name, value in metrics(case, one, idle_w).items():
            values.setdefault(name, []).append(value)
    for name, energies in (
        ("energy_per_prompt_j", [one.prompt_j for one in tally.counted]),
        ("energy_per_token_j", [one.decode_j for one in tally.counted]),
    ):
        if resolution_j is None or any(energy is None or energy < 20 * resolution_j for energy in energies):
            values.pop(name, None)
    return facts.model_copy(
        update={
            "state": "measured",
            "reason": None,
            "new_tokens": len(tally.reference),
            "tokens_sha256": digest(tally.reference),
            "noisy": tally.noisy,
            "repeated": tally.repeated,
            "others_cpu_share": max(one.others_cpu_share for one in tally.counted),
            "figures": {name: figure(found) for name, found in values.items()},
        }
    )


def described(case: Case, reason: str | None = None) -> CaseResult:
    """A case without figures."""
    return CaseResult(
        name=case.name,
        group=case.group,
        category=case.category,
        depth=len(case.depth_ids),
        prompt_tokens=len(case.prompt_ids),
        new_tokens=0,
        templated=case.templated,
        prompt_sha256=digest((*case.depth_ids, *case.prompt_ids)),
        tokens_sha256=None,
        state="not measured",
        reason=reason,
    )
