"""Comparing reports: the statistics against enumeration, a planted slowdown found, noise left alone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.benchmarks.bench.report.alike import require_alike
from edgephi.benchmarks.bench.report.comparison import compare
from edgephi.benchmarks.bench.report.comparison_table import comparison_markdown
from edgephi.benchmarks.bench.report.statistics import holm, mid_ranks, null_counts, shift, stratified_p
from edgephi.benchmarks.bench.results import Report
from edgephi.errors import UsageError
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
    assert (change.verdict, change.ratio) == ("worse", pytest.approx(1 / 1.2))


def test_a_ratio_is_the_second_median_over_the_first() -> None:
    """Repetitions in two clusters: the typical ratio of two repetitions is 0.98, that of the medians is 0.938."""
    first = [76.0, 76.5, 77.0, 80.8, 81.0, 81.2, 81.4]
    second = [75.0, 75.4, 75.6, 75.8, 79.5, 80.0, 80.2]
    before = report(case("a", "decode", {"decode_tokens_per_s": first}))
    after = report(case("a", "decode", {"decode_tokens_per_s": second}))
    found = compare(before, after)
    (change,) = found.cases
    assert (change.first, change.second) == (80.8, 75.8)
    assert change.ratio == 75.8 / 80.8 and change.cost == pytest.approx(80.8 / 75.8)
    assert abs(change.shift.ratio - change.ratio) > 0.02
    (row,) = [line for line in comparison_markdown(found, 0.05).splitlines() if line.startswith("| a ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:6] == ["80.8", "75.8", "0.938", "6.2 % lower, worse"]
    assert "| second over first |" in " ".join(comparison_markdown(found, 0.05).split())
    (inverse,) = compare(after, before).cases
    assert inverse.ratio == 80.8 / 75.8 and inverse.words == "6.6 % higher, better"


def test_no_difference_is_said_only_where_one_is_excluded() -> None:
    wide = np.linspace(0.8, 1.2, 8).tolist()
    before = report(case("a", "load", {"load_s": wide}), case("b", "decode", {"decode_tokens_per_s": wide}))
    assert {change.verdict for change in compare(before, before).cases} == {"too noisy to tell"}
    narrow = report(case("a", "load", {"load_s": np.linspace(1, 1.01, 8).tolist()}))
    assert compare(narrow, narrow).cases[0].verdict == "no difference seen"
    few = report(case("a", "load", {"load_s": [1.0, 1.0, 1.0]}))
    assert compare(few, few).cases[0].verdict == "too few runs to tell"
    text = comparison_markdown(compare(before, before), 0.05)
    assert "Of 2 figures, 2 are too noisy to tell a change of 5 %." in text


def test_disturbed_runs_come_first_and_give_no_verdict_unless_all_of_the_interval_does() -> None:
    values = np.linspace(1, 1.05, 8)

    def loads(slower: float, noisy: bool) -> Report:
        return report(
            case("a", "load", {"load_s": (slower * values).tolist()}, noisy=noisy, others_cpu_share=0.34 * noisy)
        )

    for slower, verdict in ((1.0, "too noisy to tell"), (1.06, "too noisy to tell"), (1.5, "worse"), (0.5, "better")):
        found = compare(loads(1.0, False), loads(slower, True))
        assert found.cases[0].verdict == verdict
    assert compare(loads(1.0, False), loads(1.06, False)).cases[0].verdict == "worse"
    first = comparison_markdown(found, 0.05).splitlines()[0]
    assert first == (
        "NOISY: second report: 1 of 1 cases were disturbed by other processes, which used up to 34 % of the processors."
    )


def test_equal_runs_are_quiet_both_ways_and_a_planted_gain_is_found() -> None:
    cries, gains = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(1000 + seed)
        equal = compare(simulated(rng, 8), simulated(rng, 8))
        cries += any(change.verdict in ("worse", "better") for change in (*equal.groups, *equal.cases))
        faster = compare(simulated(rng, 8, slower=0.1), simulated(rng, 8))
        gains += any(change.verdict == "better" for change in faster.groups)
        assert not faster.worse()
    assert cries <= 4
    assert gains >= 57


def test_unlike_reports_are_refused_by_name() -> None:
    speed = {"decode_tokens_per_s": [1.0, 2.0]}
    before = report(case("a", "decode", speed))
    require_alike(before, report(case("a", "decode", speed), versions={"onnxruntime": "9"}))
    other = before.workload.model_copy(update={"name": "sweep", "sha256": "d" * 64})
    with pytest.raises(UsageError, match=r"unlike: workload w \(cccccccccccc\) and workload sweep \(dddddddddddd\)"):
        require_alike(before, report(workload=other), ("bundle", "device", "settings"))
    bundle = before.bundle.model_copy(update={"name": "big", "sha256": "e" * 64})
    with pytest.raises(UsageError, match=r"bundle tiny \(b+\) and bundle big \(e+\).*--across bundle"):
        require_alike(before, report(bundle=bundle))
    require_alike(before, report(bundle=bundle), ("bundle",))
    require_alike(before, report(bundle=before.bundle.model_copy(update={"name": "renamed"})))
    with pytest.raises(UsageError, match=r"2 threads and 4 threads.*--across settings"):
        require_alike(before, report(threads=4), ("device",))
    with pytest.raises(UsageError, match=r"provider cpu and provider webgpu.*--across device"):
        require_alike(before, report(provider="webgpu"))


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
