"""Two reports side by side: ratios with confidence, and a verdict where noise cannot explain the difference.

A ratio is always the second report's median over the first's. Its interval is that of the typical ratio of two
repetitions, one of each report (`statistics.shift`). "No difference seen" is said only where the interval excludes a
change beyond the threshold; a wider interval, or repetitions that other processes disturbed, are "too noisy to tell".

Two questions are asked. Of every case: is this figure different? Repetitions are few and cases are many, so p values
are adjusted for their number (Holm). And of every figure over all cases of a group: did all move together? That finds
the same change with fewer repetitions. Repetitions within a run know nothing of what changes between runs (memory
layout, temperature), so a verdict also needs a change beyond a threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edgephi.benchmarks.bench.report.alike import identity
from edgephi.benchmarks.bench.report.history import machine_key
from edgephi.benchmarks.bench.report.statistics import DRAWS, Shift, holm, shift, stratified_p
from edgephi.benchmarks.bench.results import HIGHER_IS_BETTER, JUDGED, CaseResult, Group, Metric, Report

SIGNIFICANT = 0.05
THRESHOLD = 0.05

Verdict = Literal["worse", "better", "no difference seen", "too noisy to tell", "too few runs to tell"]


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
    noisy: bool
    """Other processes disturbed one of the cases it was read from."""
    verdict: Verdict

    @property
    def ratio(self) -> float:
        """`second` over `first`."""
        return self.second / self.first

    @property
    def cost(self) -> float:
        """Ratio of time, memory or energy, second over first: 1.1 is ten per cent worse, whichever way is up."""
        return 1 / self.ratio if self.metric in HIGHER_IS_BETTER else self.ratio

    @property
    def cost_interval(self) -> tuple[float, float]:
        """The confidence interval as a ratio of costs."""
        if self.metric in HIGHER_IS_BETTER:
            return 1 / self.shift.high, 1 / self.shift.low
        return self.shift.low, self.shift.high

    @property
    def words(self) -> str:
        """The ratio for people: "6.2 % lower, worse"."""
        moved = f"{100 * abs(self.ratio - 1):.1f} %"
        if moved == "0.0 %":
            return "the same"
        return f"{moved} {'higher' if self.ratio > 1 else 'lower'}, {'worse' if self.cost > 1 else 'better'}"

    def as_json(self) -> dict[str, object]:
        """A row of `Comparison.as_json`."""
        return {
            "case": self.case,
            "metric": self.metric,
            "first": self.first,
            "second": self.second,
            "ratio": self.ratio,
            "shift": self.shift.ratio,
            "low": self.shift.low,
            "high": self.shift.high,
            "confidence": self.shift.confidence,
            "p": self.shift.p,
            "adjusted_p": self.adjusted_p,
            "cost": self.cost,
            "noisy": self.noisy,
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
    noise: tuple[str, ...]
    """A sentence on each report whose cases other processes disturbed."""

    def worse(self) -> tuple[Change, ...]:
        """What became worse (slower, or more of memory or energy), beyond noise and threshold."""
        return tuple(change for change in (*self.groups, *self.cases) if change.verdict == "worse")

    def untold(self) -> tuple[Change, ...]:
        """Figures about which these runs say nothing: too noisy, or too few."""
        return tuple(change for change in (*self.groups, *self.cases) if change.verdict.startswith("too"))

    def as_json(self) -> dict[str, object]:
        """What `edgephi bench compare --json` prints of it; its help names the keys."""
        return {
            "noise": list(self.noise),
            "differences": list(self.differences),
            "unmatched": list(self.unmatched),
            "groups": [change.as_json() for change in self.groups],
            "cases": [change.as_json() for change in self.cases],
            "worse": len(self.worse()),
            "untold": len(self.untold()),
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
        noise=tuple(
            f"{name} report: {words}" for name, words in (("first", noise(first)), ("second", noise(second))) if words
        ),
    )


def noise(report: Report) -> str | None:
    """A sentence on the cases that other processes disturbed in every attempt; None where there are none."""
    measured = [case for case in report.cases if case.state == "measured"]
    noisy = [case for case in measured if case.noisy]
    if not noisy:
        return None
    most = max(case.others_cpu_share or 0.0 for case in noisy)
    return (
        f"{len(noisy)} of {len(measured)} cases were disturbed by other processes, which used up to {100 * most:.0f} % "
        "of the processors"
    )


def with_changes(reports: Sequence[Report]) -> list[tuple[Report, Comparison | None]]:
    """Reports, the oldest first, each with its comparison to the one before it that is alike (`alike.py`) and from the
    same machine; None: it is the first of these."""
    last: dict[tuple[object, ...], Report] = {}
    runs = []
    for report in reports:
        asked = (*identity(report), machine_key(report.machine))
        runs.append((report, compare(last[asked], report) if asked in last else None))
        last[asked] = report
    return runs


@dataclass(frozen=True)
class _Found:
    """A figure of both reports, not judged yet."""

    case: str
    metric: Metric
    first: float
    second: float
    shift: Shift
    noisy: bool


def _of_case(before: CaseResult, after: CaseResult) -> Iterator[_Found]:
    for metric in JUDGED[before.group]:
        if metric in before.figures and metric in after.figures:
            a, b = before.figures[metric], after.figures[metric]
            if min(*a.values, *b.values) > 0:
                noisy = before.noisy or after.noisy
                yield _Found(before.name, metric, a.median, b.median, shift(a.values, b.values), noisy)


def _of_groups(pairs: list[tuple[CaseResult, CaseResult]]) -> Iterator[_Found]:
    families: dict[tuple[Group, Metric], list[_Found]] = {}
    samples: dict[tuple[Group, Metric], list[tuple[tuple[float, ...], tuple[float, ...]]]] = {}
    for before, after in pairs:
        for found in _of_case(before, after):
            metric = found.metric
            families.setdefault((before.group, metric), []).append(found)
            values = (before.figures[metric].values, after.figures[metric].values)
            samples.setdefault((before.group, metric), []).append(values)
    for (group, metric), members in families.items():
        if len(members) < 2:
            continue
        logs = np.log([[found.first, found.second] for found in members])
        first, second = (float(value) for value in np.exp(logs.mean(axis=0)))
        typical = float(np.exp(np.log([found.shift.ratio for found in members]).mean()))
        low, high = _bootstrapped(samples[group, metric])
        whole = Shift(typical, low, high, 0.95, stratified_p(samples[group, metric]), 1 / DRAWS)
        noisy = any(found.noisy for found in members)
        yield _Found(f"all {len(members)} cases of {group}", metric, first, second, whole, noisy)


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


def _judged(found: list[_Found], threshold: float) -> tuple[Change, ...]:
    # a question its repetitions cannot answer does not make the others harder (Tarone 1990)
    askable = [one for one in found if one.shift.least_p < SIGNIFICANT]
    adjusted = dict(
        zip([(one.case, one.metric) for one in askable], holm([one.shift.p for one in askable]), strict=True)
    )
    changes = []
    for one in found:
        p = adjusted.get((one.case, one.metric), 1.0)
        change = Change(one.case, one.metric, one.first, one.second, one.shift, p, one.noisy, "no difference seen")
        changes.append(replace(change, verdict=_verdict(change, threshold)))
    return tuple(changes)


def _verdict(change: Change, threshold: float) -> Verdict:
    if change.shift.least_p >= SIGNIFICANT:
        return "too few runs to tell"
    most, least = 1 + threshold, 1 / (1 + threshold)
    low, high = change.cost_interval
    if change.adjusted_p < SIGNIFICANT:
        # other processes may have slowed one report more than the other: then the whole interval has to lie beyond
        if change.cost > most and (low > most or not change.noisy):
            return "worse"
        if change.cost < least and (high < least or not change.noisy):
            return "better"
    elif low > most or high < least:  # a clear change, were it the only figure that is asked about
        return "too few runs to tell"
    if change.noisy or low < least or high > most:
        return "too noisy to tell"
    return "no difference seen"


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
        ("repetitions", str(first.workload.repetitions), str(second.workload.repetitions)),
        ("stopped", first.stopped or "no", second.stopped or "no"),
        ("spinning", *(str(one.spinning.on) if one.spinning else "not recorded" for one in (first, second))),
        ("prefill", *(one.prefill or "blocks" for one in (first, second))),
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
