"""The charts of a report: speed over length and depth, what a token costs, waiting times, heat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from edgephi.benchmarks.bench.report.svg import Chart, Point, line_chart, stacked
from edgephi.benchmarks.bench.report.table import in_unit
from edgephi.benchmarks.bench.results import CaseResult, Group, Metric, Report


def charts(report: Report) -> Iterator[Chart]:
    """Prefill and decode over length and depth, as speed and as what a token costs; the answers' waiting times; the
    temperature and the clock over the run."""

    def of(group: Group) -> list[CaseResult]:
        return [case for case in report.cases if case.group == group]

    prefill = of("prefill")
    at_start = _points(
        [case for case in prefill if case.depth == 0 and case.prompt_tokens], "prefill_tokens_per_s", _length
    )
    if len(at_start) > 1:
        yield line_chart("Prefill", "prompt tokens", "tokens/s", [("", at_start)], log_x=True)
    if len({case.depth for case in prefill}) > 1:
        lines = []
        for length in sorted({case.prompt_tokens for case in prefill}):
            same = [case for case in prefill if case.prompt_tokens == length]
            lines.append((f"{length} tokens", _points(same, "prefill_tokens_per_s", _depth)))
        if any(points for _, points in lines):
            yield line_chart("Prefill at depth", "tokens in the cache", "tokens/s", lines)
    decode = _points(of("decode"), "decode_tokens_per_s", _depth)
    if len(decode) > 1:
        yield line_chart("Decode at depth", "tokens in the cache", "tokens/s", [("", decode)])
    costs = [
        ("What a decoded token costs", "tokens in the cache", decode),
        ("What a prompt's token costs", "prompt tokens", at_start),
    ]
    for title, x_label, rates in costs:
        if len(rates) > 2:
            yield line_chart(title, x_label, "ms a token", [("", [_cost(point) for point in rates])])
    answers = _points(of("answer"), "time_to_first_token_s", _length)
    if len(answers) > 1:
        yield line_chart("Time to first token", "prompt tokens", "ms", [("", answers)])
    yield from _heat(report)


def picture(report: Report) -> str | None:
    """The charts as one SVG file; None where there is none."""
    found = list(charts(report))
    heading = f"{report.bundle.name}, {report.workload.name}: {report.machine.cpu}, {report.threads} threads"
    return stacked(heading, found) if found else None


def _heat(report: Report) -> Iterator[Chart]:
    degrees = [(one.at_s, one.temperature_c) for one in report.trace if one.temperature_c is not None]
    clocks = [(one.at_s, one.clock_mhz / 1e3) for one in report.trace if one.clock_mhz is not None]
    for title, unit, readings in (("Temperature", "°C", degrees), ("Clock", "GHz", clocks)):
        if len(readings) > 2:
            yield line_chart(title, "seconds", unit, [("", [Point(round(at), y, y, y) for at, y in readings])])


def _length(case: CaseResult) -> float:
    return case.prompt_tokens


def _depth(case: CaseResult) -> float:
    return case.depth


def _points(cases: Sequence[CaseResult], metric: Metric, x: Callable[[CaseResult], float]) -> list[Point]:
    found = []
    for case in cases:
        one = case.figures.get(metric)
        if one is not None:
            found.append(Point(x(case), *(in_unit(metric, value) for value in (one.median, one.low, one.high))))
    return sorted(found, key=lambda point: point.x)


def _cost(rate: Point) -> Point:
    """Milliseconds a token from tokens a second; the quartiles change places."""
    return Point(rate.x, 1e3 / rate.y, 1e3 / rate.high, 1e3 / rate.low)
