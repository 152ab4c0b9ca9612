"""Two reports side by side: ratios with confidence, and a verdict where noise cannot explain the difference.

Two questions are asked. Of every case: is this figure different? Repetitions are few and cases are many, so p values
are adjusted for their number (Holm). And of every figure over all cases of a group: did all move together? That finds
the same change with fewer repetitions. Repetitions within a run know nothing of what changes between runs (memory
layout, temperature), so a verdict also needs a change beyond a threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgephi.benchmarks.bench.report.statistics import DRAWS, Shift, holm, shift, stratified_p
from edgephi.benchmarks.bench.results import HIGHER_IS_BETTER, JUDGED, CaseResult, Group, Metric, Report

SIGNIFICANT = 0.05
THRESHOLD = 0.05

Verdict = Literal["worse", "better", "no difference seen"]


@dataclass(frozen=True)
class Change:
    """A figure in both reports."""

    case: str
    """'all N cases of group' for the question over all."""
    metric: Metric
    first: float
    second: float
    """Medians; of all cases: geometric means of medians."""
    shift: Shift
    adjusted_p: float
    verdict: Verdict

    @property
    def cost(self) -> float:
        """Ratio of time, memory or energy, second over first: 1.1 is ten per cent worse, whichever way is up."""
        return 1 / self.shift.ratio if self.metric in HIGHER_IS_BETTER else self.shift.ratio

    def as_json(self) -> dict[str, object]:
        """A row of `Comparison.as_json`."""
        return {
            "case": self.case,
            "metric": self.metric,
            "first": self.first,
            "second": self.second,
            "ratio": self.shift.ratio,
            "low": self.shift.low,
            "high": self.shift.high,
            "confidence": self.shift.confidence,
            "p": self.shift.p,
            "adjusted_p": self.adjusted_p,
            "cost": self.cost,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """Everything two reports have in common."""

    differences: tuple[str, ...]
    """Circumstances that differ."""
    cases: tuple[Change, ...]
    groups: tuple[Change, ...]
    unmatched: tuple[str, ...]
    """Cases measured in one of the two only, or on another prompt."""

    def worse(self) -> tuple[Change, ...]:
        """What became worse (slower, or more of memory or energy), beyond noise and threshold."""
        return tuple(change for change in (*self.groups, *self.cases) if change.verdict == "worse")

    def as_json(self) -> dict[str, object]:
        """What `edgephi bench compare --json` prints of it; its help names the keys."""
        return {
            "differences": list(self.differences),
            "unmatched": list(self.unmatched),
            "groups": [change.as_json() for change in self.groups],
            "cases": [change.as_json() for change in self.cases],
            "worse": len(self.worse()),
        }


def compare(first: Report, second: Report, threshold: float = THRESHOLD) -> Comparison:
    """Compare the cases of equal name and prompt.

    Args:
        threshold: smallest change that gets a verdict, as a share of time, memory or energy: 0.05 is 5 per cent.
    """
    before = {(case.group, case.name): case for case in first.cases if case.state == "measured"}
    after = {(case.group, case.name): case for case in second.cases if case.state == "measured"}
    common = [key for key in before if key in after and before[key].prompt_sha256 == after[key].prompt_sha256]
    pairs = [(before[key], after[key]) for key in common]
    return Comparison(
        differences=tuple(_differences(first, second)),
        cases=_judged([found for pair in pairs for found in _of_case(*pair)], threshold),
        groups=_judged(list(_of_groups(pairs)), threshold),
        unmatched=tuple(name for key in {**before, **after} if key not in common for name in [key[1]]),
    )


def with_changes(reports: Sequence[Report]) -> list[tuple[Report, Comparison | None]]:
    """Reports, the oldest first, each with its comparison to the one before it of the same workload and provider; None:
    it is the first of these."""
    last: dict[tuple[str, str], Report] = {}
    runs = []
    for report in reports:
        asked = (report.workload.sha256, report.provider)
        runs.append((report, compare(last[asked], report) if asked in last else None))
        last[asked] = report
    return runs


def _of_case(before: CaseResult, after: CaseResult) -> Iterator[tuple[str, Metric, float, float, Shift]]:
    for metric in JUDGED[before.group]:
        if metric in before.figures and metric in after.figures:
            a, b = before.figures[metric], after.figures[metric]
            if min(*a.values, *b.values) > 0:
                yield before.name, metric, a.median, b.median, shift(a.values, b.values)


def _of_groups(pairs: list[tuple[CaseResult, CaseResult]]) -> Iterator[tuple[str, Metric, float, float, Shift]]:
    families: dict[tuple[Group, Metric], list[tuple[str, Metric, float, float, Shift]]] = {}
    samples: dict[tuple[Group, Metric], list[tuple[tuple[float, ...], tuple[float, ...]]]] = {}
    for before, after in pairs:
        for found in _of_case(before, after):
            metric = found[1]
            families.setdefault((before.group, metric), []).append(found)
            values = (before.figures[metric].values, after.figures[metric].values)
            samples.setdefault((before.group, metric), []).append(values)
    for (group, metric), members in families.items():
        if len(members) < 2:
            continue
        logs = np.log([[first, second] for _, _, first, second, _ in members])
        first, second = (float(value) for value in np.exp(logs.mean(axis=0)))
        ratios = np.log([found[4].ratio for found in members])
        ratio = float(np.exp(ratios.mean()))
        low, high = _bootstrapped(samples[group, metric])
        p = stratified_p(samples[group, metric])
        whole = Shift(ratio, low, high, 0.95, p, 1 / DRAWS)
        yield f"all {len(members)} cases of {group}", metric, first, second, whole


def _bootstrapped(samples: list[tuple[tuple[float, ...], tuple[float, ...]]], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the geometric mean over cases of the ratio of medians; repetitions drawn anew (percentile)."""
    rng = np.random.default_rng(0)
    total = np.zeros(draws)
    for first, second in samples:
        for values, sign in ((first, -1), (second, 1)):
            drawn = rng.choice(np.log(values), (draws, len(values)))
            total += sign * np.median(drawn, axis=1)
    low, high = np.quantile(total / len(samples), (0.025, 0.975))
    return float(np.exp(low)), float(np.exp(high))


def _judged(found: list[tuple[str, Metric, float, float, Shift]], threshold: float) -> tuple[Change, ...]:
    # a question its repetitions cannot answer does not make the others harder (Tarone 1990)
    askable = [one for one in found if one[4].least_p < SIGNIFICANT]
    adjusted = dict(zip([one[:2] for one in askable], holm([one[4].p for one in askable]), strict=True))
    changes = []
    for case, metric, first, second, moved in found:
        p = adjusted.get((case, metric), 1.0)
        change = Change(case, metric, first, second, moved, p, "no difference seen")
        verdict: Verdict = "no difference seen"
        if p < SIGNIFICANT and change.cost > 1 + threshold:
            verdict = "worse"
        elif p < SIGNIFICANT and change.cost < 1 / (1 + threshold):
            verdict = "better"
        changes.append(Change(case, metric, first, second, moved, p, verdict))
    return tuple(changes)


def _differences(first: Report, second: Report) -> Iterator[str]:
    """What else changed: a reader must not take it for the change he made."""
    pairs = [
        ("bundle", first.bundle.sha256[:12], second.bundle.sha256[:12]),
        ("workload", first.workload.sha256[:12], second.workload.sha256[:12]),
        ("provider", first.provider, second.provider),
        ("profile", first.profile or "none", second.profile or "none"),
        ("hardware", first.hardware or "CPU", second.hardware or "CPU"),
        ("providers", ", ".join(first.providers), ", ".join(second.providers)),
        ("threads", str(first.threads), str(second.threads)),
        ("spinning", *(str(one.spinning.on) if one.spinning else "not recorded" for one in (first, second))),
        ("power", first.conditions.power_source or "unknown", second.conditions.power_source or "unknown"),
        ("power mode", first.conditions.power_mode or "unknown", second.conditions.power_mode or "unknown"),
    ]
    before, after = first.machine.model_dump(), second.machine.model_dump()
    pairs += [(name, str(before[name]), str(after[name])) for name in before]
    names = sorted({*first.versions, *second.versions})
    pairs += [(name, first.versions.get(name, "absent"), second.versions.get(name, "absent")) for name in names]
    for name, a, b in pairs:
        if a != b:
            yield f"{name}: {a} → {b}"
    answers = {(case.name, case.prompt_sha256): case.tokens_sha256 for case in first.cases if case.tokens_sha256}
    other = [
        case.name
        for case in second.cases
        if case.tokens_sha256 and answers.get((case.name, case.prompt_sha256), case.tokens_sha256) != case.tokens_sha256
    ]
    if other:
        yield f"generated text: {', '.join(other)}"
