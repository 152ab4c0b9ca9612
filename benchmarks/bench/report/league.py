"""Many reports in one table: a section for every workload and group, the best of a chosen figure first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgephi.benchmarks.bench.report.alike import report_name
from edgephi.benchmarks.bench.report.comparison import noise
from edgephi.benchmarks.bench.report.headline import HEADLINES, headline_cell, headlines, shown
from edgephi.benchmarks.bench.report.rows import Named
from edgephi.benchmarks.bench.results import Report, read_report
from edgephi.errors import UsageError

FACTS = ("label", "device", "provider", "threads", "bundle", "version")
"""Columns before the figures."""

GROUPS: dict[str, Callable[[Named], str]] = {
    "label": lambda named: named[0],
    "device": lambda named: named[1].hardware or named[1].machine.cpu,
    "provider": lambda named: named[1].provider,
    "bundle": lambda named: named[1].bundle.name,
    "version": lambda named: version(named[1]),
}
"""By the word that `--group-by` takes."""


@dataclass(frozen=True)
class Section:
    """Reports of one workload and one group."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    reports: tuple[Named, ...]
    """In the order of the rows."""


def read_reports(paths: Sequence[Path]) -> list[Named]:
    """Reports by their names. A folder without a report.json stands for all that lie in it, at any depth.

    Raises:
        UsageError: a folder holds none.
        BundleError: one cannot be read.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir() and not (path / "report.json").is_file():
            inside = sorted(path.rglob("report.json"))
            if not inside:
                raise UsageError(
                    "the folder holds no report.json", where=path, remedy="Name what `edgephi bench --output` wrote"
                )
            found += inside
        else:
            found.append(path)
    reports: dict[str, Report] = {}
    for path in found:
        report = read_report(path)
        name = plain = report_name(report, path)
        number = 1
        while name in reports:
            number += 1
            name = f"{plain} ({number})"
        reports[name] = report
    return list(reports.items())


def version(report: Report) -> str:
    """edgephi's version and onnxruntime's, which move figures."""
    return f"edgephi {report.edgephi}, onnxruntime {report.versions.get('onnxruntime', 'unknown')}"


def league(reports: Sequence[Named], *, sort: str | None = None, group_by: Sequence[str] = ()) -> list[Section]:
    """Sections in the order in which their workloads and groups first occur.

    Figures of different workloads are never in one section.

    Args:
        sort: a key of `HEADLINES`; reports without it come last. None: the first that the section has.
        group_by: keys of `GROUPS`.
    """
    sections: dict[tuple[str, ...], list[Named]] = {}
    for named in reports:
        key = (named[1].workload.sha256, *(GROUPS[word](named) for word in group_by))
        sections.setdefault(key, []).append(named)
    return [_section(members, key[1:], sort) for key, members in sections.items()]


def _section(members: Sequence[Named], group: Sequence[str], sort: str | None) -> Section:
    numbers = {name: headlines(report) for name, report in members}
    columns = shown(list(numbers.values()))
    by = sort or (columns[0] if columns else "decode")

    def place(named: Named) -> float:
        value = numbers[named[0]].get(by)
        if value is None:
            return float("inf")
        return -value if HEADLINES[by].higher_is_better else value

    ranked = sorted(members, key=place)
    remarks = [_remarks(report) for _, report in ranked]
    headings = (*FACTS, *(HEADLINES[name].title for name in columns), *(["remarks"] if any(remarks) else []))
    rows = []
    for (name, report), remark in zip(ranked, remarks, strict=True):
        device, threads = report.hardware or report.machine.cpu, str(report.threads or "")
        known = (name, device, report.provider, threads, report.bundle.name)
        cells = (headline_cell(column, numbers[name].get(column)) for column in columns)
        rows.append((*known, version(report), *cells, *([remark] if any(remarks) else [])))
    workload = members[0][1].workload.name
    order = f"best {HEADLINES[by].title.partition(',')[0]} first"
    return Section(f"{', '.join([workload, *group])} ({order})", headings, tuple(rows), tuple(ranked))


def _remarks(report: Report) -> str:
    words = noise(report)
    counts = "" if words is None else f"noisy: {words.split(' cases')[0]} cases"
    return ", ".join(filter(None, [counts, f"stopped: {report.stopped}" if report.stopped else ""]))
