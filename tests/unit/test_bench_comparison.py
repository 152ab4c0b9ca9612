"""Comparing reports: the statistics against enumeration, a planted slowdown found, noise left alone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.benchmarks.bench.report.comparison import compare
from edgephi.benchmarks.bench.report.statistics import holm, mid_ranks, null_counts, shift, stratified_p
from edgephi.benchmarks.bench.results import Report
from tests.bench_reports import case, report

# Repetitions on the two-core machine this was written on: a spread of 3 %, and now and then one run a fifth slower
SPREAD, HICCUP, HICCUPS = 0.03, 0.2, 0.05


def times(rng: np.random.Generator, count: int, slower: float = 0.0) -> NDArray[np.float64]:
    """Relative durations of repetitions."""
    hiccups = HICCUP * (rng.random(count) < HICCUPS)
    return (1 + slower) * (1 + hiccups) * np.exp(rng.normal(0, SPREAD, count))


def simulated(rng: np.random.Generator, count: int, slower: float = 0.0) -> Report:
    """What a run of the quick workload gives, with every duration longer by a share."""

    def repetitions(typical: float) -> list[float]:
        return (typical * times(rng, count, slower)).tolist()

    def rates(typical: float) -> list[float]:
        return (typical / times(rng, count, slower)).tolist()

    return report(
        case("load, warm", "load", {"load_s": repetitions(0.5), "load_to_first_token_s": repetitions(0.6)}),
        case("prefill 128", "prefill", {"prefill_tokens_per_s": rates(900)}),
        case("prefill 512", "prefill", {"prefill_tokens_per_s": rates(1000)}),
        case("decode 32 at depth 0", "decode", {"decode_tokens_per_s": rates(150)}),
        case("decode 32 at depth 512", "decode", {"decode_tokens_per_s": rates(110)}),
        case(
            "question",
            "answer",
            {"time_to_first_token_s": repetitions(0.05), "decode_tokens_per_s": rates(140)},
        ),
    )


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (4, 4), (5, 3), (1, 6)])
def test_the_null_distribution_is_that_of_all_orders(n: int, m: int) -> None:
    counted = np.zeros(n * m + 1)
    for second in combinations(range(n + m), m):
        counted[sum(sum(a < b for a in range(n + m) if a not in second) for b in second)] += 1
    np.testing.assert_array_equal(null_counts(n, m), counted)


def test_p_counts_the_orders_as_extreme() -> None:
    assert shift([1, 2, 3, 4], [5, 6, 7, 8]).p == pytest.approx(2 / 70)
    assert shift([5, 6, 7, 8], [1, 2, 3, 4]).p == pytest.approx(2 / 70)
    assert shift([1, 2, 3, 5], [4, 6, 7, 8]).p == pytest.approx(4 / 70)
    assert shift([1, 3, 5], [2, 4, 6]).p > 0.5
    assert shift([2, 2, 2], [2, 2, 2]).p == 1
    assert shift([1.0], [9.0]).least_p == 1


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [shift(times(rng, 6).tolist(), times(rng, 7, 0.2).tolist()) for _ in range(600)]
    held = np.mean([one.low <= 1.2 <= one.high for one in found])
    assert found[0].confidence >= 0.95
    assert held >= found[0].confidence - 0.02
    assert np.median([one.ratio for one in found]) == pytest.approx(1.2, rel=0.01)


def test_an_interval_that_few_repetitions_cannot_give_says_how_sure_it_is() -> None:
    one = shift([1, 2, 3], [2, 4, 6])
    assert one.confidence == pytest.approx(1 - 2 / 20)
    assert (one.low, one.high) == pytest.approx((2 / 3, 6))


def test_ranks_and_holm_as_in_the_textbook() -> None:
    np.testing.assert_array_equal(mid_ranks(np.array([3.0, 1.0, 3.0, 2.0])), [3.5, 1, 3.5, 2])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_stratified_test_is_uniform_on_noise_and_small_on_a_change() -> None:
    rng = np.random.default_rng(3)
    # cases of different size must not hide a change, and do not make one
    noise = [
        stratified_p([(scale * times(rng, 3), scale * times(rng, 3)) for scale in (1, 10, 100)], draws=499)
        for _ in range(200)
    ]
    assert np.mean(np.array(noise) < 0.05) < 0.1
    assert 0.35 < np.mean(np.array(noise) < 0.5) < 0.65
    assert stratified_p([(scale * times(rng, 3), scale * times(rng, 3, 0.15)) for scale in (1, 10, 100, 7)]) < 0.01


def test_a_planted_slowdown_of_ten_per_cent_is_caught() -> None:
    caught, named = 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = compare(simulated(rng, 8), simulated(rng, 8, slower=0.1)).worse()
        caught += bool(found)
        named += any(change.case == "all 2 cases of decode" for change in found)
    assert caught == 40
    assert named >= 34


def test_noise_does_not_cry() -> None:
    rng = np.random.default_rng(11)
    cries = sum(bool(compare(simulated(rng, 8), simulated(rng, 8)).worse()) for _ in range(100))
    assert cries <= 5


def test_a_change_below_the_threshold_gets_no_verdict_however_sure() -> None:
    values = np.linspace(1, 1.001, 8)
    before = report(case("load, warm", "load", {"load_s": values.tolist()}))
    after = report(case("load, warm", "load", {"load_s": (1.03 * values).tolist()}))
    (change,) = compare(before, after).cases
    assert change.adjusted_p < 0.01
    assert change.verdict == "no difference seen"
    assert compare(before, after, threshold=0.02).cases[0].verdict == "worse"
    assert compare(after, before, threshold=0.02).cases[0].verdict == "better"


def test_direction_follows_the_figure() -> None:
    values = np.linspace(1, 1.001, 8)
    before = report(case("a", "decode", {"decode_tokens_per_s": values.tolist()}))
    after = report(case("a", "decode", {"decode_tokens_per_s": (values / 1.2).tolist()}))
    (change,) = compare(before, after).cases
    assert change.cost == pytest.approx(1.2)
    assert (change.verdict, change.shift.ratio) == ("worse", pytest.approx(1 / 1.2))


def test_what_cannot_be_told_makes_nothing_else_harder() -> None:
    """Forty figures of two repetitions beside one of eight: only the one is asked."""
    few = [case(f"p{index}", "load", {"load_s": [1.0, 1.1]}) for index in range(40)]
    values = np.linspace(1, 1.001, 8)
    before = report(*few, case("a", "decode", {"decode_tokens_per_s": values.tolist()}))
    after = report(*few, case("a", "decode", {"decode_tokens_per_s": (values / 1.2).tolist()}))
    assert [change.case for change in compare(before, after).worse()] == ["a"]


def test_only_equal_prompts_are_compared_and_other_circumstances_are_named() -> None:
    speed = {"decode_tokens_per_s": [1.0, 2.0]}
    before = report(
        case("same", "decode", speed),
        case("prompt", "decode", speed),
        case("gone", "decode", speed),
        case("wrong", "decode", speed),
    )
    after = report(
        case("same", "decode", speed, tokens_sha256="other"),
        case("prompt", "decode", speed, prompt_sha256="other"),
        case("wrong", "decode", {}, state="wrong answers"),
        versions={"onnxruntime": "1.32"},
        threads=8,
    )
    found = compare(before, after)
    assert [change.case for change in found.cases] == ["same"]
    assert set(found.unmatched) == {"prompt", "gone", "wrong"}
    assert set(found.differences) == {"threads: 2 → 8", "onnxruntime: 1.31.1 → 1.32", "generated text: same"}
