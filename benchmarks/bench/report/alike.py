"""Which reports may be compared: the same questions to the same bundle on the same device with the same settings.

What differs in one of these is refused by name. A person who means to compare two bundles, devices or settings says
so; two workloads are never compared, because their cases ask for different work. Machines and versions may differ:
a change of these is what a comparison is for, and it is named beside the figures.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from edgephi.benchmarks.bench.results import Report
from edgephi.errors import UsageError


def identity(report: Report) -> tuple[object, ...]:
    """What two reports must have in common to be alike, for a dictionary's key."""
    return tuple(fact for facts in _facts(report).values() for fact, _ in facts)


def require_alike(first: Report, second: Report, across: Collection[str] = ()) -> None:
    """Refuse to compare unlike reports.

    Args:
        across: kinds of facts that may differ: `bundle`, `device`, `settings`.

    Raises:
        UsageError: something else differs; both sides are named.
    """
    before, after = _facts(first), _facts(second)
    unlike = {
        kind: [f"{a[1]} and {b[1]}" for a, b in zip(before[kind], after[kind], strict=True) if a[0] != b[0]]
        for kind in before
        if kind not in across
    }
    unlike = {kind: named for kind, named in unlike.items() if named}
    if not unlike:
        return
    if "workload" in unlike:
        remedy = "Compare reports of one workload; `edgephi bench table` lists reports of several"
    else:
        options = " ".join(f"--across {kind}" for kind in unlike)
        remedy = f"Pass {options} to compare them all the same"
    named = ", ".join(words for found in unlike.values() for words in found)
    raise UsageError(f"the reports are unlike: {named}", remedy=remedy)


def _facts(report: Report) -> dict[str, list[tuple[object, str]]]:
    """Facts and their names, by the word of `--across` that lets them differ, or `workload`."""
    spinning = "not recorded" if report.spinning is None else "on" if report.spinning.on else "off"
    prefill = report.prefill or "blocks"  # earlier reports knew nothing else
    workload, bundle = report.workload, report.bundle
    return {
        "workload": [(workload.sha256, f"workload {workload.name} ({workload.sha256[:12]})")],
        "bundle": [(bundle.sha256, f"bundle {bundle.name} ({bundle.sha256[:12]})")],
        "device": [
            (report.provider, f"provider {report.provider}"),
            (report.hardware, f"hardware {report.hardware or 'CPU'}"),
        ],
        "settings": [
            (report.threads, f"{report.threads} threads"),
            (spinning, f"spinning {spinning}"),
            (prefill, f"prefill by {prefill}"),
        ],
    }


def report_name(report: Report, path: Path) -> str:
    """What to call a report: its label, or the name of its folder or file."""
    if report.label is not None:
        return report.label
    path = path.absolute()
    if path.name == "report.json":
        path = path.parent
    return path.stem if path.suffix == ".json" else path.name
