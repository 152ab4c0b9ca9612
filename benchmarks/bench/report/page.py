"""The HTML report: one file, no script, nothing fetched; and its charts alone, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from edgephi.benchmarks.bench.report.svg import Point, line_chart, stacked
from edgephi.benchmarks.bench.report.table import SPREAD, facts, in_unit, notes, tables
from edgephi.benchmarks.bench.results import CaseResult, Group, Metric, Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1rem; } dt { color: #666; } dd { margin: 0; }
svg { max-width: 100%; height: auto; margin: .5rem 1rem .5rem 0; }
svg text { font: 12px system-ui, sans-serif; } svg .t { font-weight: 600; font-size: 13px; }
svg .g { stroke: #e4e4e4; }
"""
# names in a report may come from a stranger: what slipped through escaping could still neither run nor fetch
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report) -> str:
    """The report as one HTML document."""
    heading = f"{report.bundle.name}, {report.workload.name}"
    body = [f"<h1>{escape(heading)}</h1>", f"<p>{escape(report.workload.description)}</p>", *charts(report)]
    body += [_table(header, rows) for header, rows in tables(report)]
    body.append(f"<p>{SPREAD}</p>")
    if report.derived:
        derived = [(one.name, f"{one.value:,.3g}", one.formula) for one in report.derived]
        body += ["<h2>Derived</h2>", _table(("", "value", "how"), derived)]
    if remarks := notes(report):
        body += ["<h2>Without figures</h2>", "<ul>", *(f"<li>{escape(remark)}</li>" for remark in remarks), "</ul>"]
    terms = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(report)]
    body += ["<h2>Conditions</h2>", "<dl>", *terms, "</dl>"]
    head = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(heading)}</title><style>{STYLE}</style></head><body>",
    ]
    return "\n".join([*head, *body, "</body></html>\n"])


def charts(report: Report) -> Iterator[str]:
    """Prefill and decode over length and depth, as speed and as what a token costs; the answers' waiting times."""

    def of(group: Group) -> list[CaseResult]:
        return [case for case in report.cases if case.group == group]

    prefill = of("prefill")
    at_start = _points([case for case in prefill if case.depth == 0], "prefill_tokens_per_s", _length)
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


def picture(report: Report) -> str | None:
    """The charts as one SVG file; None where there is none."""
    found = list(charts(report))
    heading = f"{report.bundle.name}, {report.workload.name}: {report.machine.cpu}, {report.threads} threads"
    return stacked(heading, found) if found else None


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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ["<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
