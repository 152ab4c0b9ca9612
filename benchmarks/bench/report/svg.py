"""Line charts as SVG, in a page or in a file of their own: no script, nothing fetched.

Across, places are shares of the chart's width, and down they are pixels. So a chart takes whatever width a page gives
it, while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from edgephi.errors import printable

PLOT_HEIGHT = 200
NARROWEST = 250
"""Pixels across on a phone: labels that overlap at this width are left out."""
EDGE = 0.03
"""Share of the width on the left and the right without points."""
SERIES = 6
"""Colours; a further line has the first again, dashed and with hollow dots."""

COLOURS = """
  --ground: #ffffff; --text: #1b1e24; --soft: #565c68; --line: #dcdfe5;
  --s0: #2754c4; --s1: #b4451f; --s2: #2f7d32; --s3: #7a3d8c; --s4: #7d6200; --s5: #50565f;"""
DARK = """
  --ground: #16181d; --text: #e6e8ec; --soft: #a3a9b5; --line: #3a3f49;
  --s0: #8fb0ff; --s1: #ff9e7a; --s2: #7fd18b; --s3: #d6a4e8; --s4: #e0c15a; --s5: #b6bcc8;"""
STYLE = """
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--soft); }
svg .title { font-weight: 600; font-size: 14px; fill: var(--text); } svg .name { fill: var(--text); }
svg .rule { stroke: var(--line); } svg .through { stroke-width: 2; } svg .ground { fill: var(--ground); }
.through.again { stroke-dasharray: 5 4; } circle.again { fill: var(--ground); stroke-width: 2; }
"""
STYLE += "\n".join(
    f".s{n} {{ stroke: var(--s{n}); }} .d{n}, svg text.d{n} {{ fill: var(--s{n}); }}" for n in range(SERIES)
)

WIDTH, LEFT, RIGHT, ABOVE, BELOW, LEGEND_ROW = 640, 64, 20, 46, 60, 18
"""Of a chart in a file of its own, where the title, the labels and the legend need room."""


@dataclass(frozen=True)
class Point:
    """A median with its quartiles at a place on the horizontal axis."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """A drawn chart and the words around it."""

    title: str
    unit: str
    x_label: str
    names: tuple[str, ...]
    """Of the lines, for a legend; empty where there is only one line."""
    body: str
    """Elements of SVG, in an area of any width that is PLOT_HEIGHT high; labels lie outside of it."""


def line_chart(
    title: str, x_label: str, unit: str, series: Sequence[tuple[str, Sequence[Point]]], *, log_x: bool = False
) -> Chart:
    """Lines through medians, with bars from quartile to quartile. The vertical axis begins at 0.

    Args:
        series: name and points of each line; at least one point in all.
        log_x: logarithmic; every x is then above 0.
    """
    points = [point for _, line in series for point in line]
    place = [math.log2(p.x) if log_x else p.x for p in points]
    first, width = min(place), max(place) - min(place)
    highest = max(max(p.high, p.y) for p in points)
    step = nice_step(highest / 5)
    top = step * max(1, math.ceil(highest / step))

    def across(x: float) -> float:
        share = ((math.log2(x) if log_x else x) - first) / width if width else 0.5
        return EDGE + share * (1 - 2 * EDGE)

    def down(y: float) -> float:
        return PLOT_HEIGHT * (1 - max(0.0, y) / top)

    parts = [text("50%", PLOT_HEIGHT + 38, x_label)]
    for index in range(round(top / step) + 1):
        y = down(index * step)
        parts.append(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(text("-8", y + 4, f"{index * step:,.10g}", anchor="end"))
    end = -math.inf
    for x in sorted({p.x for p in points}):
        label, middle = f"{x:,.10g}", across(x) * NARROWEST
        if middle - text_width(label) / 2 >= end:
            end = middle + text_width(label) / 2 + 6
            parts.append(text(percent(across(x)), PLOT_HEIGHT + 18, label))
    for index, (_, line) in enumerate(series):
        parts += _line([(percent(across(p.x)), p) for p in line], down, index)
    names = tuple(name for name, _ in series) if len(series) > 1 else ()
    return Chart(title, unit, x_label, names, "\n".join(parts))


def _line(places: Sequence[tuple[str, Point]], down: Callable[[float], float], index: int) -> list[str]:
    """Pieces of the line first, so that bars and dots lie on them."""
    colour = index % SERIES
    again = " again" if index >= SERIES else ""
    parts = [
        f'<line x1="{a}" y1="{down(p.y):.1f}" x2="{b}" y2="{down(q.y):.1f}" class="through s{colour}{again}"/>'
        for (a, p), (b, q) in pairwise(places)
    ]
    for x, p in places:
        if f"{down(p.low):.1f}" != f"{down(p.high):.1f}":
            ends = f'y1="{down(p.low):.1f}" y2="{down(p.high):.1f}"'
            parts.append(f'<line x1="{x}" x2="{x}" {ends} class="bar s{colour}"/>')
        parts.append(f'<circle cx="{x}" cy="{down(p.y):.1f}" r="3.5" {_dot(index)}><title>{p.y:.4g}</title></circle>')
    return parts


def _dot(index: int) -> str:
    colour = index % SERIES
    return f'class="s{colour} again"' if index >= SERIES else f'class="d{colour}"'


def inline(chart: Chart) -> str:
    """A chart as a figure of a page, which needs `COLOURS` and `STYLE`; the title and the legend wrap as text does."""
    label = escape(f"{chart.title}, {chart.unit}, over {chart.x_label}")
    caption = f"<figcaption><b>{escape(chart.title)}</b> <span>{escape(chart.unit)}</span></figcaption>"
    drawn = f'<svg role="img" aria-label="{label}" height="{PLOT_HEIGHT}">{chart.body}</svg>'
    names = "".join(
        f'<li><svg width="12" height="12" aria-hidden="true"><circle cx="6" cy="6" r="4" {_dot(index)}/>'
        f"</svg>{escape(printable(name))}</li>"
        for index, name in enumerate(chart.names)
    )
    return f'<figure class="chart">{caption}{drawn}{f"<ul>{names}</ul>" if names else ""}</figure>'


def stacked(heading: str, charts: Sequence[Chart]) -> str:
    """Charts in two columns under a heading, as an SVG document that carries its style, for light and dark."""
    columns = min(2, len(charts))
    rows = [charts[start : start + columns] for start in range(0, len(charts), columns)]
    heights = [ABOVE + PLOT_HEIGHT + BELOW + LEGEND_ROW * max(len(one.names) for one in row) for row in rows]
    parts = [text(str(LEFT), 26, heading, anchor="start", kind="title")]
    for row_index, row in enumerate(rows):
        for index, chart in enumerate(row):
            place = f"translate({index * WIDTH} {40 + sum(heights[:row_index])})"
            parts.append(f'<g transform="{place}">{_apart(chart)}</g>')
    return document(columns * WIDTH, 40 + sum(heights), heading, parts)


def document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """An SVG file: its ground, its colours for light and dark, and what is drawn on it."""
    style = f":root {{{COLOURS} }}\n@media (prefers-color-scheme: dark) {{ :root {{{DARK} }} }}\n{STYLE}"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">',
        f"<title>{escape(printable(title))}</title>",
        f"<style>{style}</style>",
        '<rect width="100%" height="100%" class="ground"/>',
    ]
    return "\n".join([*head, *parts, "</svg>\n"])


def _apart(chart: Chart) -> str:
    title = text(str(LEFT), 28, f"{chart.title}, {chart.unit}", anchor="start", kind="title")
    area = f'x="{LEFT}" y="{ABOVE}" width="{WIDTH - LEFT - RIGHT}" height="{PLOT_HEIGHT}" overflow="visible"'
    parts = [title, f"<svg {area}>{chart.body}</svg>"]
    for index, name in enumerate(chart.names):
        y = ABOVE + PLOT_HEIGHT + BELOW + LEGEND_ROW * index
        parts.append(f'<circle cx="{LEFT + 6}" cy="{y - 4}" r="4" {_dot(index)}/>')
        parts.append(text(str(LEFT + 18), y, name, anchor="start", kind="name"))
    return "\n".join(parts)


def nice_step(rough: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def percent(share: float) -> str:
    """0.5 → 50%."""
    return f"{100 * share:.2f}%"


def text_width(words: str) -> float:
    """Pixels that a text of 12 px takes at most in the usual fonts."""
    return 7.4 * len(words)


def text(x: str, y: float, words: str, *, anchor: str = "middle", kind: str = "") -> str:
    """A line of text; `kind` is a class of `STYLE`."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(printable(words))}</text>'
