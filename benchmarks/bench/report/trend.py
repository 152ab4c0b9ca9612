"""Reports of a history: which are asked for, and a small chart of how a figure moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from edgephi.benchmarks.bench.report.alike import identity
from edgephi.benchmarks.bench.report.headline import HEADLINES, headline_cell, headlines
from edgephi.benchmarks.bench.report.svg import Point, line_chart, stacked
from edgephi.benchmarks.bench.report.table import in_unit
from edgephi.benchmarks.bench.results import Report
from edgephi.errors import UsageError

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Wanted:
    """Which reports of a history to show; None: all."""

    device: str | None = None
    """The provider's short name, the device that was asked for, or a part of the hardware's name."""
    bundle: str | None = None
    """The name, or the beginning of the SHA-256."""
    workload: str | None = None
    label: str | None = None
    since: datetime | None = None

    def has(self, report: Report) -> bool:
        """Whether a report is asked for."""
        hardware = (report.hardware or report.machine.cpu).lower()
        device = self.device is None or (
            self.device in (report.provider, report.device) or self.device.lower() in hardware
        )
        bundle = self.bundle is None or (
            report.bundle.name == self.bundle
            or (len(self.bundle) >= 6 and report.bundle.sha256.startswith(self.bundle))
        )
        return (
            device
            and bundle
            and self.workload in (None, report.workload.name)
            and self.label in (None, report.label)
            and (self.since is None or _moment(report.created) >= self.since)
        )


def read_since(text: str) -> datetime:
    """A date or a date with a time, ISO 8601; without a zone it is UTC, as the reports' are.

    Raises:
        UsageError: it is neither.
    """
    try:
        return _moment(text)
    except ValueError:
        raise UsageError(f"--since is {text!r}", remedy="Give a date, as 2026-03-31 or 2026-03-31T18:00") from None


def series(reports: Sequence[Report]) -> list[list[Report]]:
    """Reports that are alike, so that their figures make a line; the oldest first."""
    lines: dict[tuple[object, ...], list[Report]] = {}
    for report in reports:
        lines.setdefault(identity(report), []).append(report)
    return list(lines.values())


def sparkline(values: Sequence[float]) -> str:
    """Bars from the least value, which is the lowest, to the greatest; equal values are in the middle."""
    least, most = min(values), max(values)
    if most == least:
        return BARS[3] * len(values)
    return "".join(BARS[round((value - least) / (most - least) * (len(BARS) - 1))] for value in values)


def charts(reports: Sequence[Report]) -> list[str]:
    """A line for every figure of every series with two runs or more."""
    lines = []
    for line in series(reports):
        first, numbers = line[0], [headlines(report) for report in line]
        for name, headline in HEADLINES.items():
            values = [one[name] for one in numbers if name in one]
            if len(values) > 1:
                ends = f"{headline_cell(name, values[0])} to {headline_cell(name, values[-1])}"
                ratio = f"last over first {values[-1] / values[0]:.3f}" if values[0] else "first is 0"
                about = f"{first.bundle.name}, {first.workload.name}, {first.provider}, {first.threads} threads"
                lines.append(f"{sparkline(values)}  {headline.title}: {ends} ({ratio}; {about})")
    return lines


def picture(reports: Sequence[Report], figure: str) -> str:
    """One chart as an SVG document: the figure over the number of the run, a line for every series.

    Args:
        figure: a key of `HEADLINES`.

    Raises:
        UsageError: no report has the figure.
    """
    metric = HEADLINES[figure].metric
    lines = []
    for line in series(reports):
        points = []
        for index, report in enumerate(line):
            value = headlines(report).get(figure)
            if value is not None:
                shown = value if metric is None else in_unit(metric, value)
                points.append(Point(index + 1, shown, shown, shown))
        if points:
            first = line[0]
            lines.append((f"{first.bundle.name}, {first.workload.name}, {first.provider}", points))
    if not lines:
        raise UsageError(f"no run of this history has {figure!r}", remedy=f"Choose one of {', '.join(HEADLINES)}")
    title = HEADLINES[figure].title
    return stacked(f"History of {title}", [line_chart(title, "run", title, lines)])


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
