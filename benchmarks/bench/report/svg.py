"""Line charts as SVG, inline or a file of its own: no script, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 46
STYLE = "text { font: 12px system-ui, sans-serif; } .t { font-weight: 600; font-size: 13px; } .g { stroke: #e4e4e4; }"
COLOURS = ("#2457a6", "#b4451f", "#3d7a2e", "#7a3d8c", "#8a6d00", "#4a4a4a")


@dataclass(frozen=True)
class Point:
    """A median with its quartiles at a place on the horizontal axis."""

    x: float
    y: float
    low: float
    high: float


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[tuple[str, Sequence[Point]]], *, log_x: bool = False
) -> str:
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
        return LEFT + 12 + share * (WIDTH - LEFT - RIGHT - 24)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - max(0.0, y) / top * (HEIGHT - TOP - BOTTOM)

    middle = HEIGHT / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'width="{WIDTH}" height="{HEIGHT}">',
        f"<title>{escape(title)}</title>",
        f'<text x="{LEFT}" y="18" class="t">{escape(title)}</text>',
        _text((LEFT + WIDTH) / 2, HEIGHT - 8, x_label),
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>',
    ]
    for index in range(round(top / step) + 1):
        y = down(index * step)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="g"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{index * step:,.10g}", "end"))
    previous = -math.inf
    for x in sorted({p.x for p in points}):
        if across(x) - previous >= 40:  # labels must not overlap
            previous = across(x)
            parts.append(_text(previous, HEIGHT - BOTTOM + 18, f"{x:,.10g}"))
    for index, (name, line) in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{across(p.x):.1f},{down(p.y):.1f}" for p in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for p in line:
            x, low, high = across(p.x), down(p.low), down(p.high)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
            dot = f'<circle cx="{x:.1f}" cy="{down(p.y):.1f}" r="3" fill="{colour}">'
            parts.append(f"{dot}<title>{p.y:.4g}</title></circle>")
        if len(series) > 1:
            parts.append(_text(WIDTH - RIGHT, TOP + 14 * index, name, "end", colour))
    return "\n".join([*parts, "</svg>"])


def stacked(heading: str, charts: Sequence[str]) -> str:
    """Charts in two columns under a heading, as an SVG document that carries its style."""
    columns = min(2, len(charts))
    width, height = columns * WIDTH, 40 + -(-len(charts) // columns) * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="26" class="t">{escape(heading)}</text>',
    ]
    for index, chart in enumerate(charts):
        across, down = index % columns * WIDTH, 40 + index // columns * HEIGHT
        parts.append(f'<g transform="translate({across} {down})">{chart}</g>')
    return "\n".join([*parts, "</svg>\n"])


def nice_step(rough: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#1c1c1c") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
