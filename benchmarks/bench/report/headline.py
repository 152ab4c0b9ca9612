"""One number for each thing that people ask about a report, so that many reports fit into one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from edgephi.benchmarks.bench.derive import SCORE, median
from edgephi.benchmarks.bench.report.table import digits, in_unit
from edgephi.benchmarks.bench.results import CaseResult, Group, Metric, Report

PROMPT = 512
"""Tokens: of several prompts the one nearest to this stands for prefill."""


@dataclass(frozen=True)
class Headline:
    """How a number is called, which way is up, and what it is read from."""

    title: str
    higher_is_better: bool
    metric: Metric | None
    """Whose unit it has; None: none."""


HEADLINES: dict[str, Headline] = {
    "score": Headline("score", True, None),
    "decode": Headline("decode, tokens/s", True, "decode_tokens_per_s"),
    "prefill": Headline("prefill, tokens/s", True, "prefill_tokens_per_s"),
    "first-token": Headline("first token, ms", False, "time_to_first_token_s"),
    "load": Headline("load, ms", False, "load_s"),
    "memory": Headline("private memory, MB", False, "steady_private_bytes"),
    "energy": Headline("J/token", False, "energy_per_token_j"),
}
"""By the word that `--sort` takes."""


@dataclass(frozen=True)
class Origin:
    """A headline's number and where it comes from."""

    value: float
    """In the unit of `Metric`."""
    of: str
    """The case, or how several were put together."""
    case: CaseResult | None = None


def headlines(report: Report) -> dict[str, float]:
    """The numbers of `origins`, by the same names."""
    return {name: one.value for name, one in origins(report).items()}


def origins(report: Report) -> dict[str, Origin]:
    """The numbers a report has.

    prefill: the prompt nearest to 512 tokens with nothing before it. decode, energy: the case with the least before it.
    Without such cases, the geometric mean over the answers, which must all be there. first-token: that mean. load and
    memory: warm, else cold. score: the Procyon-style score.
    """

    def of(group: Group) -> list[CaseResult]:
        return [case for case in report.cases if case.group == group]

    prompts = sorted(
        (case for case in of("prefill") if case.depth == 0), key=lambda case: abs(case.prompt_tokens - PROMPT)
    )
    decoded = sorted(of("decode"), key=lambda case: case.depth)
    loads = sorted(of("load"), key=lambda case: case.name, reverse=True)  # warm before cold
    answers = of("answer")
    score = next((one.value for one in report.derived if one.name == SCORE), None)
    found = {
        "score": None if score is None else Origin(score, f"Procyon-style, of {len(answers)} answers"),
        "decode": _first(decoded, "decode_tokens_per_s") or _mean(answers, "decode_tokens_per_s"),
        "prefill": _first(prompts, "prefill_tokens_per_s") or _mean(answers, "prefill_tokens_per_s"),
        "first-token": _mean(answers, "time_to_first_token_s"),
        "load": _first(loads, "load_s"),
        "memory": _first(loads, "steady_private_bytes"),
        "energy": _first(decoded, "energy_per_token_j") or _mean(answers, "energy_per_token_j"),
    }
    return {name: value for name, value in found.items() if value is not None}


def headline_cell(name: str, value: float | None) -> str:
    """A number for people; empty where there is none."""
    if value is None:
        return ""
    metric = HEADLINES[name].metric
    return digits(value if metric is None else in_unit(metric, value))


def shown(reports: Sequence[dict[str, float]]) -> list[str]:
    """The names of which at least one report has a number: empty columns are left out."""
    return [name for name in HEADLINES if any(name in one for one in reports)]


def _first(cases: Sequence[CaseResult], metric: Metric) -> Origin | None:
    return next((Origin(value, case.name, case) for case in cases if (value := median(case, metric)) is not None), None)


def _mean(cases: Sequence[CaseResult], metric: Metric) -> Origin | None:
    """The geometric mean over all cases; None when one lacks the figure, which makes it another test."""
    if len(cases) == 1:
        return _first(cases, metric)
    found = [value for case in cases if (value := median(case, metric)) is not None]
    if not found or len(found) < len(cases) or min(found) <= 0:
        return None
    return Origin(geometric_mean(found), f"mean of {len(found)} answers")
