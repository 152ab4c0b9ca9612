"""The HTML report: one file, no script, nothing fetched. `page.css` is how it looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from edgephi.benchmarks.bench.report.charts import charts
from edgephi.benchmarks.bench.report.headline import HEADLINES, Origin, headline_cell, origins
from edgephi.benchmarks.bench.report.svg import COLOURS, DARK, STYLE, inline
from edgephi.benchmarks.bench.report.table import (
    NOT_MEASURED,
    cautions,
    facts,
    in_unit,
    is_outlier,
    notes,
    spread_and_gaps,
    tables,
    with_spread,
)
from edgephi.benchmarks.bench.results import Ceiling, Group, Metric, Report
from edgephi.errors import printable

# names in a report may come from a stranger: what slipped through escaping could still neither run nor fetch
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# printed in the light colours, whatever the screen has
SHEET = f":root {{{COLOURS} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{DARK} }} }}\n{STYLE}"
HEADINGS: dict[Group, str] = {
    "load": "Loading",
    "prefill": "Prefill",
    "decode": "Decode",
    "answer": "Answers",
    "speculation": "Speculation",
}


def page(report: Report) -> str:
    """The report as one HTML document."""
    heading = f"{report.bundle.name}, {report.workload.name}"
    drawn = [inline(chart) for chart in charts(report)]
    derived = [(one.name, f"{one.value:,.3g}", one.formula) for one in report.derived]
    body = [
        "<header>",
        f"<h1>{_text(report.bundle.name)} <span>{_text(report.workload.name)}</span></h1>",
        f"<p>{_text(report.workload.description)}</p>",
        f'<ul class="chips">{"".join(f"<li>{_text(words)}</li>" for words in _chips(report))}</ul>',
        "</header><main>",
        *(f'<p class="caution">{_text(words)}</p>' for words in cautions(report)),
        *_tiles(report),
        *(['<section class="charts" aria-label="Charts">', *drawn, "</section>"] if drawn else []),
        *(_table(HEADINGS[_group(header)], header, rows) for header, rows in tables(report)),
        f'<p class="small">{_text(spread_and_gaps(report))}</p>',
        *([_table("Derived", ("figure", "value", "how"), derived, "wide words")] if derived else []),
    ]
    if remarks := notes(report):
        body += ["<h2>Without figures</h2>", "<ul>", *(f"<li>{_text(remark)}</li>" for remark in remarks), "</ul>"]
    terms = [f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts(report)]
    body += ["<h2>Conditions</h2>", '<dl class="facts">', *terms, "</dl>"]
    head = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{_text(heading)}</title>",
        f"<style>{SHEET}\n{Path(__file__).with_name('page.css').read_text(encoding='utf-8')}</style></head><body>",
    ]
    return "\n".join([*head, *body, "</main></body></html>\n"])


def _text(words: str) -> str:
    """Words as text of HTML, without characters that would turn the direction of what follows them."""
    return escape(printable(" ".join(words.split())))


def _chips(report: Report) -> Iterator[str]:
    if report.label:
        yield report.label
    yield report.hardware or report.machine.cpu
    yield f"{report.provider}, {report.threads} threads" if report.threads else report.provider
    yield f"{report.bundle.family}, {report.bundle.precision}, {report.bundle.stored_bytes / 1e6:,.0f} MB"
    yield f"edgephi {report.edgephi}"
    yield report.created[:16].replace("T", " ") + " UTC"


def _tiles(report: Report) -> list[str]:
    """The headline numbers, each with its noise, its case and, where there is one, its share of a ceiling."""
    tiles = [_tile(report, name, origin) for name, origin in origins(report).items()]
    return ['<ul class="tiles" aria-label="Headline figures">', *tiles, "</ul>"] if tiles else []


def _tile(report: Report, name: str, origin: Origin) -> str:
    title, _, unit = HEADLINES[name].title.partition(", ")
    if not unit and HEADLINES[name].metric:
        title, unit = name, title
    value, spread = headline_cell(name, origin.value), ""
    metric = HEADLINES[name].metric
    figure = origin.case.figures.get(metric) if origin.case and metric else None
    if figure is not None and metric is not None and len(figure.values) > 1:
        half = in_unit(metric, (figure.high - figure.low) / 2)
        value, spread = with_spread(in_unit(metric, origin.value), half)
    parts = [
        f'<span class="name">{_text(title)}</span>',
        f"<strong>{_text(value)} <small>{_text(unit)}</small></strong>",
        f"<span>{f'± {_text(spread)} · ' if spread else ''}{_text(origin.of)}</span>",
    ]
    if share := _share(report, origin):
        parts.append(f"<span>{_text(share)}</span>")
    noisy = origin.case is not None and origin.case.noisy
    return f"<li{' class=noisy' if noisy else ''}>{''.join(parts)}{'<em>noisy</em>' if noisy else ''}</li>"


def _share(report: Report, origin: Origin) -> str | None:
    limits, case = report.roofline, origin.case
    if limits is None or case is None:
        return None
    ceilings: dict[Metric, tuple[str, Ceiling]] = {
        "bandwidth_share": ("the memory bandwidth", limits.bandwidth),
        "int8_share": ("the int8 peak", limits.int8),
    }
    for metric, (name, ceiling) in ceilings.items():
        if metric in case.figures:
            doubt = ", an outlier" if is_outlier(ceiling.per_s) else ""
            return f"{in_unit(metric, case.figures[metric].median):.0f} % of {name}{doubt}"
    return None


def _group(header: Sequence[str]) -> Group:
    return next(group for group in HEADINGS if group == header[0])


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "wide") -> str:
    """A table in a box of its own that scrolls, by keyboard too; `kind` is its classes."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{' class=none' if words == NOT_MEASURED else ''}>{_text(words)}</td>" for words in rest)
        lines.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    box = f'<div class="{kind}" tabindex="0" role="region" aria-label="{_text(title)}, table">{table}</div>'
    return f"<h2>{_text(title)}</h2>{box}"
