"""Numbers that follow from figures: score, what depth costs, how cost grows, what speculation gains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, geometric_mean

import numpy as np

from edgephi.benchmarks.bench.results import CaseResult, Derived, Metric
from edgephi.benchmarks.bench.workload import Score
from edgephi.runtime.engines.genai import PREFILL_CHUNK

SCORE = "Procyon-style score"


def derive(cases: Sequence[CaseResult], score: Score | None) -> tuple[Derived, ...]:
    """All that the measured cases allow."""
    return (*_score(cases, score), *_means(cases), *_decay(cases), *_growth(cases), *_gains(cases))


def procyon_style(score: Score, first_token_s: Sequence[float], tokens_per_s: Sequence[float]) -> float:
    """sqrt(S_ttft × S_ots): S_ttft = ttft_numerator / mean seconds, S_ots = mean tokens/s × 5000 / rate_of_5000."""
    ttft = score.ttft_numerator / fmean(first_token_s)
    rate = fmean(tokens_per_s) * 5000 / score.rate_of_5000
    return math.sqrt(ttft * rate)


def median(case: CaseResult, metric: Metric) -> float | None:
    """The median of a figure, or None when it was not measured."""
    return case.figures[metric].median if metric in case.figures else None


def _score(cases: Sequence[CaseResult], score: Score | None) -> list[Derived]:
    answers = [case for case in cases if case.group == "answer"]
    first = [median(case, "time_to_first_token_s") for case in answers]
    rate = [median(case, "decode_tokens_per_s") for case in answers]
    if score is None or None in (*first, *rate):
        return []  # one answer missing makes it another test
    value = procyon_style(score, [x for x in first if x is not None], [x for x in rate if x is not None])
    a, b = score.ttft_numerator, score.rate_of_5000
    formula = f"sqrt({a:g} / mean time to first token × 5000 × mean decode rate / {b:g})"
    return [Derived(name=SCORE, value=value, formula=formula)]


def _means(cases: Sequence[CaseResult]) -> list[Derived]:
    """Geometric means over the answers, in which no kind of prompt outweighs another; all answers must be there."""
    answers = [case for case in cases if case.group == "answer"]
    first = [value for case in answers if (value := median(case, "time_to_first_token_s"))]
    rate = [value for case in answers if (value := median(case, "decode_tokens_per_s"))]
    if len(answers) < 2 or not len(first) == len(rate) == len(answers):
        return []
    formula = f"geometric mean of the medians of {len(answers)} answers"
    return [
        Derived(name="mean time to first token, s", value=geometric_mean(first), formula=formula),
        Derived(name="mean decode rate, tokens/s", value=geometric_mean(rate), formula=formula),
    ]


def _decay(cases: Sequence[CaseResult]) -> list[Derived]:
    """Decode speed at every depth over that at the least."""
    depths = [
        (case, value) for case in cases if case.group == "decode" and (value := median(case, "decode_tokens_per_s"))
    ]
    if len(depths) < 2:
        return []
    depths.sort(key=lambda pair: pair[0].depth)
    (first, best), *rest = depths
    formula = f"median decode rate over that at depth {first.depth}"
    return [
        Derived(name=f"decode speed kept at depth {case.depth}", value=value / best, formula=formula)
        for case, value in rest
    ]


def _growth(cases: Sequence[CaseResult]) -> list[Derived]:
    """ms per token = a + b · thousands of tokens, by least squares on medians, where three points or more are there.

    Prompts shorter than one piece of a prefill are left out: they cost more per token for another reason.
    """
    decode = [
        (case.depth, 1e3 / rate)
        for case in cases
        if case.group == "decode" and (rate := median(case, "decode_tokens_per_s"))
    ]
    prefill = [
        (case.prompt_tokens, 1e3 / rate)
        for case in cases
        if case.group == "prefill"
        and case.depth == 0
        and case.prompt_tokens >= PREFILL_CHUNK
        and (rate := median(case, "prefill_tokens_per_s"))
    ]
    found = []
    for name, along, points in (("decode", "in the cache", decode), ("prefill", "of prompt", prefill)):
        if len({place for place, _ in points}) >= 3:
            slope, start = np.polyfit([place / 1e3 for place, _ in points], [ms for _, ms in points], 1)
            formula = f"least squares over {len(points)} medians"
            found += [
                Derived(name=f"{name}, ms a token to begin with", value=float(start), formula=formula),
                Derived(name=f"{name}, ms more per 1,000 tokens {along}", value=float(slope), formula=formula),
            ]
    return found


def _gains(cases: Sequence[CaseResult]) -> list[Derived]:
    found = []
    pairs: dict[str, dict[str, float]] = {}
    for case in cases:
        value = median(case, "decode_tokens_per_s")
        if case.group == "speculation" and value is not None:
            pairs.setdefault(case.category, {})[case.name.rsplit(" ", 1)[1]] = value
    for name, rates in pairs.items():
        if len(rates) == 2:
            gain = rates["on"] / rates["off"]
            found.append(Derived(name=f"speculation, {name}", value=gain, formula="median decode rate, on over off"))
    return found
