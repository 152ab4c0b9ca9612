"""A report of the peers as a picture: speed against KL divergence, an SVG file whose labels never lie on each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from edgephi.benchmarks.bench.report.svg import SERIES, document, nice_step, text, text_width
from edgephi.benchmarks.compare_runtimes.results import ComparisonReport, ContenderResult, Speed
from edgephi.benchmarks.compare_runtimes.table import figure_title

WIDTH, HEIGHT = 640, 600
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 60, 56
LEAST_KL = 1e-7
"""Nats: what is below, or 0, is drawn here, for the axis is logarithmic."""
MARK = 6
"""Pixels around the middle of a dot that no label covers."""
LINE = 15
"""Pixels that a line of text is high."""


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two have a common point."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


@dataclass(frozen=True)
class _Dot:
    """A contender in the picture; y is down."""

    name: str
    ours: bool
    x: float
    y: float
    low: float
    high: float
    """Ends of the quartiles' bar, across."""
    said: str

    @property
    def box(self) -> Box:
        return Box(min(self.low, self.x - MARK), self.y - MARK, max(self.high, self.x + MARK), self.y + MARK)


def picture(report: ComparisonReport) -> str | None:
    """Prefill and decode speed over KL divergence, for light and dark; None where nothing has all three."""
    rows = [one for one in report.contenders if one.quality and one.prefill and one.decode]
    if not rows:
        return None
    heading = f"{report.weights}, {report.settings.threads} threads"
    parts = [text(str(LEFT), 26, heading, anchor="start", kind="title")]
    # the longest prompt, and the shallowest cache
    parts += _chart("prefill", rows, [one.prefill[-1] for one in rows], 0)
    parts += _chart("decode", rows, [one.decode[0] for one in rows], WIDTH)
    return document(2 * WIDTH, HEIGHT, f"{heading}: speed and divergence", parts)


def _chart(metric: str, rows: Sequence[ContenderResult], speeds: Sequence[Speed], offset: float) -> Iterator[str]:
    left, right, bottom = float(offset + LEFT), float(offset + WIDTH - RIGHT), float(HEIGHT - BOTTOM)
    step = nice_step(max(speed.figure.high for speed in speeds) / 5)
    most = step * math.ceil(max(speed.figure.high for speed in speeds) / step)
    powers = [math.log10(_kl(one)) for one in rows]
    lowest, highest = math.floor(min(powers)), max(math.ceil(max(powers)), math.floor(min(powers)) + 1)

    def across(speed: float) -> float:
        return left + speed / most * (right - left)

    def down(power: float) -> float:
        return bottom - (power - lowest) / (highest - lowest) * (bottom - TOP)

    for exponent in range(lowest, highest + 1):
        y = down(exponent)
        yield f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>'
        yield text(f"{left - 8}", y + 4, f"{10.0**exponent:g}".replace("e-0", "e-"), anchor="end")
    for index in range(round(most / step) + 1):
        yield text(f"{across(index * step):.1f}", bottom + 18, f"{index * step:,.10g}")
    yield text(f"{(left + right) / 2}", bottom + 38, f"{figure_title(metric, speeds[0].tokens)}, tokens/s")
    yield text(f"{left}", TOP - 14, "KL divergence to float32, nats", anchor="start")
    dots = []
    for one, speed, power in zip(rows, speeds, powers, strict=True):
        found, y = speed.figure, down(power)
        said = f"{one.name}: {found.median:,.0f} tokens/s, KL {_kl(one):.2g}"
        x, low, high = (across(value) for value in (found.median, found.low, found.high))
        dots.append(_Dot(one.name, one.peer == "edgephi", x, y, low, high, said))
    for index, dot in enumerate(dots):
        yield from _drawn(dot, index % SERIES)
    area = Box(left, TOP - 8, right + RIGHT, bottom)
    labels = place_labels([dot.box for dot in dots], [dot.name for dot in dots], area)
    for index, (dot, label) in enumerate(zip(dots, labels, strict=True)):
        yield from _label(dot, label, index % SERIES)


def _label(dot: _Dot, label: Box, colour: int) -> Iterator[str]:
    """The name in the colour of its dot, and a thin line between the two where the name is further away."""
    on_the_left = label.right <= dot.x
    middle = (label.top + label.bottom) / 2
    if abs(middle - dot.y) > LINE + 1:
        end = label.right if on_the_left else label.left if label.left > dot.x else dot.x
        ends = f'x1="{dot.x:.1f}" y1="{dot.y:.1f}" x2="{end:.1f}" y2="{middle:.1f}"'
        yield f'<line {ends} class="s{colour}" stroke-width="0.7"/>'
    x, anchor = (label.right - 2, "end") if on_the_left else (label.left + 2, "start")
    yield text(f"{x:.1f}", label.bottom - 4, dot.name, anchor=anchor, kind=f"d{colour}")


def _drawn(dot: _Dot, colour: int) -> Iterator[str]:
    yield f'<line x1="{dot.low:.1f}" x2="{dot.high:.1f}" y1="{dot.y:.1f}" y2="{dot.y:.1f}" class="s{colour}"/>'
    said = f"<title>{escape(dot.said)}</title>"
    if dot.ours:
        place = f'x="{dot.x - 4.5:.1f}" y="{dot.y - 4.5:.1f}" width="9" height="9"'
        yield f'<rect {place} class="d{colour}">{said}</rect>'
    else:
        yield f'<circle cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="4.5" class="d{colour}">{said}</circle>'


def place_labels(marks: Sequence[Box], names: Sequence[str], area: Box) -> list[Box]:
    """A place for each name beside its mark: the nearest one that meets no mark, no other name and no edge.

    Where no place is free, the one on the right of the mark.
    """
    taken: list[Box] = list(marks)
    found = []
    for mark, name in zip(marks, names, strict=True):
        places = list(_places(mark, text_width(name) + 4, area))
        free = (box for box in places if _within(box, area) and not any(box.meets(other) for other in taken))
        found.append(next(free, places[0]))
        taken.append(found[-1])
    return found


def _places(mark: Box, width: float, area: Box) -> Iterator[Box]:
    """Right, left, above and below of the mark, then the same a line further away."""
    middle, y = (mark.left + mark.right) / 2, (mark.top + mark.bottom) / 2
    for away in range(math.ceil((area.bottom - area.top) / LINE)):
        for step in dict.fromkeys((-away, away)):
            top = y + step * LINE - LINE / 2
            for left in (mark.right + 2, mark.left - 2 - width, middle - width / 2):
                yield Box(left, top, left + width, top + LINE)


def _within(box: Box, area: Box) -> bool:
    across = area.left <= box.left and box.right <= area.right
    return across and area.top <= box.top and box.bottom <= area.bottom


def _kl(one: ContenderResult) -> float:
    return max(one.quality.kl_mean if one.quality else 0.0, LEAST_KL)
