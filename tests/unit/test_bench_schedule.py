"""What is measured, in which order, and what counts: seen by engines and clocks that do as they are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from edgephi.benchmarks.bench.cases import Case, digest
from edgephi.benchmarks.bench.measure import Instruments, Sample, measure, metrics
from edgephi.benchmarks.bench.meters.trace import Trace
from edgephi.benchmarks.bench.meters.usage import Usage
from edgephi.benchmarks.bench.pace import Pace, TimeLeft
from edgephi.benchmarks.bench.schedule import Tally, planned_cost, result, run_cases
from edgephi.benchmarks.bench.workload import Method
from edgephi.runtime.sampling import Chooser

PREFILL_NS, STEP_NS = 40_000_000, 5_000_000


class Clock:
    """Time passes only when somebody works."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


class CountingSequence:
    """Answers 0, 1, 2, … and takes its time."""

    recomputed = 0

    def __init__(self, clock: Clock, capacity: int) -> None:
        self.clock, self.capacity = clock, capacity
        self.tokens: list[int] = []
        self.closed = False
        self.given = 0

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        self.tokens += tokens
        self.clock.ns += PREFILL_NS
        return True

    def step(self, choose: Chooser) -> int:
        self.clock.ns += STEP_NS
        self.given += 1
        assert len(self.tokens) + self.given <= self.capacity
        return choose(np.eye(10, dtype=np.float32)[self.given - 1])

    def rewind(self, length: int) -> None:
        raise AssertionError

    def reuse(self, prompt: Sequence[int]) -> int:
        raise AssertionError

    def close(self) -> None:
        self.closed = True


def a_case(**changes: object) -> Case:
    made = Case("c", "answer", "answer", (7, 7, 7), (1, 2, 3, 4), 5)
    return replace(made, **changes)  # type: ignore[arg-type]


def measured(case: Case, joules: Callable[[Clock], float] | None = None) -> tuple[Sample, CountingSequence]:
    clock = Clock()
    sequences: list[CountingSequence] = []

    def open_sequence(capacity: int) -> CountingSequence:
        sequences.append(CountingSequence(clock, capacity))
        return sequences[0]

    def usage() -> Usage:
        seconds = clock.ns / 1e9  # two processors: one is ours half the time, the other somebody else's a quarter
        return Usage(own_s=0.5 * seconds, busy_s=0.75 * seconds, total_s=2 * seconds)

    meter = None if joules is None else lambda: joules(clock)
    return measure(open_sequence, case, Instruments(clock, usage, meter)), sequences[0]


def test_the_clock_runs_from_the_prompt_to_each_token_and_not_while_the_cache_is_filled() -> None:
    sample, engine = measured(a_case())
    assert sample.tokens == (0, 1, 2, 3, 4)
    assert sample.first_token_s == pytest.approx(0.045)
    assert sample.intervals_s == pytest.approx([0.005] * 4)
    assert engine.tokens == [7, 7, 7, 1, 2, 3, 4]
    assert engine.closed


def test_metrics_are_what_they_are_called() -> None:
    sample, _ = measured(a_case())
    found = metrics(a_case(), sample, None)
    assert found["time_to_first_token_s"] == pytest.approx(0.045)
    assert found["prefill_tokens_per_s"] == pytest.approx(4 / 0.045)
    assert found["decode_tokens_per_s"] == pytest.approx(200)
    assert found["inter_token_p50_s"] == found["inter_token_p99_s"] == pytest.approx(0.005)
    assert found["cpu_share"] == pytest.approx(0.25)
    assert sample.others_cpu_share == pytest.approx(0.125)
    assert "energy_per_prompt_j" not in found


def test_energy_has_idle_subtracted_and_is_split_at_the_first_token() -> None:
    """A machine of 30 W, 10 of them idle."""
    sample, _ = measured(a_case(), lambda clock: 30 * clock.ns / 1e9)
    found = metrics(a_case(), sample, 10.0)
    assert found["energy_per_prompt_j"] == pytest.approx(20 * 0.045)
    assert found["energy_per_token_j"] == pytest.approx(20 * 0.005)


def test_a_stop_token_ends_an_answer() -> None:
    sample, _ = measured(a_case(stop_ids=frozenset({2})))
    assert sample.tokens == (0, 1, 2)


def test_percentiles_are_those_of_numpy() -> None:
    gaps = (0.001, 0.002, 0.004, 0.1)
    sample = Sample((1,) * 5, 0.1, gaps, 0.0, 0.0, 0.0)
    found = metrics(a_case(), sample, None)
    assert found["inter_token_p95_s"] == pytest.approx(np.quantile(gaps, 0.95))
    assert found["decode_tokens_per_s"] == pytest.approx(4 / sum(gaps))


QUIET = Sample((1, 2), 1.0, (0.01,), 0.5, 0.0, 0.4)
LOUD = replace(QUIET, others_cpu_share=0.5)


def test_every_case_runs_once_a_round_in_an_order_that_changes_and_can_be_repeated() -> None:
    cases = [a_case(name=str(index)) for index in range(5)]

    def order(seed: int) -> list[str]:
        seen: list[str] = []

        def run(case: Case) -> Sample:
            seen.append(case.name)
            return QUIET

        run_cases(cases, run, Method(warmups=1, repetitions=6, seed=seed), sleep=lambda s: None)
        return seen

    names = order(1)
    rounds = [names[start : start + 5] for start in range(0, len(names), 5)]
    assert len(rounds) == 7 and all(sorted(one) == list("01234") for one in rounds)
    assert rounds[0] == list("01234"), "the warm-up"
    assert len({tuple(one) for one in rounds}) > 3
    assert names == order(1) != order(2)


def test_progress_adds_up_and_pauses_are_kept() -> None:
    cases, done, slept = [a_case(), a_case(name="d", new_tokens=9)], [0], [0.0]

    def advance(cost: int) -> None:
        done[0] += cost

    def sleep(seconds: float) -> None:
        slept[0] += seconds

    method = Method(warmups=2, repetitions=3, pause_s=5)
    run_cases(cases, lambda case: QUIET, method, advance=advance, sleep=sleep)
    assert done[0] == planned_cost(cases, method)
    assert slept[0] == 2 * 5 * 5.0


def test_a_disturbed_run_is_done_again_and_the_quietest_counts() -> None:
    runs = iter([QUIET, LOUD, replace(LOUD, others_cpu_share=0.3), replace(LOUD, others_cpu_share=0.4), QUIET])
    method = Method(warmups=1, repetitions=4, noisy_repeats=2)
    (tally,) = run_cases([a_case()], lambda case: next(runs, QUIET), method, sleep=lambda s: None)
    assert [one.others_cpu_share for one in tally.counted] == [0.3, 0.0, 0.0, 0.0]
    assert (tally.repeated, tally.noisy) == (2, True)


def test_repeating_is_bounded_over_the_whole_run() -> None:
    count = [0]

    def run(case: Case) -> Sample:
        count[0] += 1
        return LOUD

    (tally,) = run_cases([a_case()], run, Method(warmups=1, repetitions=8, noisy_repeats=2), sleep=lambda s: None)
    assert count[0] == 1 + 8 + 4
    assert len(tally.counted) == 8 and tally.noisy


def test_a_run_too_short_for_the_processors_ticks_is_not_called_disturbed() -> None:
    short = replace(LOUD, first_token_s=0.01)
    (tally,) = run_cases([a_case()], lambda case: short, Method(repetitions=3), sleep=lambda s: None)
    assert not tally.noisy and not tally.repeated


def test_a_fast_wrong_answer_does_not_count() -> None:
    runs = iter([QUIET, QUIET, replace(QUIET, tokens=(1, 3)), QUIET])
    (tally,) = run_cases([a_case()], lambda case: next(runs), Method(repetitions=3), sleep=lambda s: None)
    found = result(a_case(), tally, None, None)
    assert found.state == "wrong answers" and not found.figures
    assert found.reason == "1 of 3 runs gave other tokens than the first"


def test_a_result_has_a_figure_for_every_repetition_and_names_what_was_generated() -> None:
    (tally,) = run_cases([a_case()], lambda case: QUIET, Method(repetitions=3), sleep=lambda s: None)
    found = result(a_case(), tally, None, None)
    assert found.figures["time_to_first_token_s"].values == (1.0, 1.0, 1.0)
    assert found.tokens_sha256 == digest((1, 2)) and found.new_tokens == 2
    assert found.prompt_sha256 == digest((7, 7, 7, 1, 2, 3, 4)) and found.depth == 3


@pytest.mark.parametrize(("energy", "kept"), [(100.0, True), (1.0, False)])
def test_energy_near_the_meters_resolution_is_not_reported(energy: float, kept: bool) -> None:
    metered = replace(QUIET, prompt_j=energy, decode_j=100.0)
    (tally,) = run_cases([a_case()], lambda case: metered, Method(repetitions=2), sleep=lambda s: None)
    found = result(a_case(), tally, 2.0, resolution_j=1.0).figures
    assert ("energy_per_prompt_j" in found) == kept
    assert "energy_per_token_j" in found


def test_a_time_budget_and_an_interruption_keep_what_is_counted() -> None:
    now = [0.0]

    def run(case: Case) -> Sample:
        now[0] += 1
        return QUIET

    cases = [a_case(name=str(index)) for index in range(3)]
    method, tallies = Method(warmups=1, repetitions=4), [Tally() for _ in range(3)]
    pace = Pace(budget_s=8, clock=lambda: now[0])
    with pace.within():
        run_cases(cases, run, method, tallies=tallies, before=pace.check, sleep=lambda s: None)
    assert pace.stopped == "the time budget of 8 s was used up"
    assert sorted(len(tally.counted) for tally in tallies) == [1, 2, 2]
    assert result(cases[0], Tally(), None, None).reason == "the run stopped before it"


@pytest.mark.parametrize("per_depth", [0.0, 2e-5])
def test_the_time_left_does_not_grow(per_depth: float) -> None:
    """Cases of very different size, in which a token costs more the longer the context is."""
    now = [0.0]
    cases = [
        replace(a_case(name=f"{depth} {new}"), depth_ids=(1,) * depth, prompt_ids=(1,) * prompt, new_tokens=new)
        for depth, prompt, new in ((0, 16, 1), (0, 128, 1), (4000, 1, 32), (0, 1, 32), (0, 2000, 1), (0, 30, 256))
    ]

    def run(case: Case) -> Sample:
        before = len(case.depth_ids) + len(case.prompt_ids)
        step = 0.02 + per_depth * before
        prompt = before * (0.002 + per_depth * before / 20)
        now[0] += prompt + step * (case.new_tokens - 1)
        return replace(QUIET, first_token_s=prompt, intervals_s=(step,) * (case.new_tokens - 1))

    method = Method(warmups=1, repetitions=5, pause_s=2)
    left, seen = TimeLeft(cases, method), []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def advance(cost: int) -> None:
        seen.append((now[0], left.seconds()))

    assert left.seconds() is None
    run_cases(cases, run, method, left=left, advance=advance, sleep=sleep, clock=lambda: now[0])
    end = now[0]
    estimates = [estimate for _, estimate in seen if estimate is not None]
    assert len(estimates) == 36
    assert all(later <= earlier for earlier, later in pairwise(estimates))
    true = [end - at for at, _ in seen]
    warmed_up = len(cases)
    assert estimates[warmed_up:] == pytest.approx(true[warmed_up:], abs=method.pause_s + 1e-6)
    assert estimates[0] < 3 * true[0]


def test_a_trace_is_read_at_intervals_and_bounded() -> None:
    now = [0.0]
    trace = Trace(clock=lambda: now[0], temperature=lambda: 40 + now[0], frequency=lambda: None)
    for tick in range(4000):
        now[0] = tick / 2
        trace.read()
    found = trace.readings()
    assert len(found) <= 1001 and found[0].at_s == 0 and found[-1].at_s > 1900
    assert all(one.temperature_c == 40 + one.at_s for one in found)
    silent = Trace(clock=lambda: 0.0, temperature=lambda: None, frequency=lambda: None)
    silent.read()
    assert silent.readings() == ()
