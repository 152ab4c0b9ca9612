"""edgephi bench compare, history and table: what reports say side by side and over time."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgephi.commands.terminal.options import Json, bundle_folder, model_names
from edgephi.errors import OutputError, UsageError, printable

if TYPE_CHECKING:
    from edgephi.benchmarks.bench.report.comparison import Change, Comparison
    from edgephi.benchmarks.bench.report.rows import Named
    from edgephi.benchmarks.bench.results import Report

Figure = Literal["score", "decode", "prefill", "first-token", "load", "memory", "energy"]
GroupBy = StrEnum("GroupBy", ["label", "device", "provider", "bundle", "version"])  # typer takes no list of Literals
Across = StrEnum("Across", ["bundle", "device", "settings"])
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV, one line for every figure of every case.")]


def compare(
    reports: Annotated[
        list[Path], typer.Argument(metavar="FIRST SECOND...", help="Report folders or their report.json.")
    ],
    across: Annotated[
        list[Across] | None,
        typer.Option(
            "--across",
            metavar="|".join(Across),
            help="Compare although this differs; may be given several times.",
            show_default=False,
        ),
    ] = None,
    fail_over: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT", help="Exit with status 1 when something is worse by more, as 5%.", show_default=False
        ),
    ] = None,
    as_csv: AsCsv = False,
    as_json: Json = False,
) -> None:
    """Compare reports of the same workload with the first of them, and say what noise cannot explain.

    A ratio is the later report's median over the first's. A figure is called worse (slower, or more memory or energy)
    or better when its repetitions differ beyond chance (Mann-Whitney test, adjusted for the number of figures, p below
    0.05) and by more than the threshold: that of --fail-over, else 5 %. "No difference seen" means that a change
    beyond the threshold is excluded. Where the confidence interval is wider than that, or other processes were busy,
    the runs are too noisy to tell. Figures of all cases of a group are judged together as well, which finds a common
    change with fewer repetitions.

    Reports of different workloads are refused. Those of different bundles, devices or settings (threads, spinning)
    are refused unless --across names what differs.

    With --json, one object: threshold; noise, differences (sentences on disturbances, and on what else changed);
    unmatched (names of cases in one report only); groups and cases, lists of report (name of the later one), case,
    metric, first and second (medians), ratio (second over first), shift (the typical ratio of two repetitions), low and
    high (the shift's confidence interval), confidence, p, adjusted_p, cost (ratio of time, memory or energy, above 1
    is worse), noisy, verdict ("worse", "better", "no difference seen", "too noisy to tell", "too few runs to tell");
    worse and untold (how many are, or cannot be told).
    """
    from edgephi.benchmarks.bench.report.alike import require_alike
    from edgephi.benchmarks.bench.report.comparison import THRESHOLD
    from edgephi.benchmarks.bench.report.comparison import compare as compared
    from edgephi.benchmarks.bench.report.league import read_reports

    threshold = THRESHOLD if fail_over is None else _share(fail_over)
    named = read_reports(reports)
    if len(named) < 2:
        raise UsageError("there is one report only", remedy="Name two or more")
    for _, later in named[1:]:
        require_alike(named[0][1], later, across or ())
    found = [(name, compared(named[0][1], later, threshold)) for name, later in named[1:]]
    if as_json:
        _print_comparisons_json(found, threshold)
    elif as_csv:
        _print_comparisons_csv(found)
    else:
        _print_comparisons(named, found, threshold)
    if fail_over is not None and any(one.worse() for _, one in found):
        raise typer.Exit(1)


def _print_comparisons(named: list[Named], found: list[tuple[str, Comparison]], threshold: float) -> None:
    from edgephi.benchmarks.bench.report.comparison_table import comparison_markdown, ordinal
    from edgephi.commands.terminal.tables import print_markdown

    words = [f"{ordinal(index)}: {name}, {report.created}" for index, (name, report) in enumerate(named)]
    parts = ["\n".join(map(printable, words))]
    parts += [comparison_markdown(one, threshold, ordinal(index + 1)) for index, (_, one) in enumerate(found)]
    print_markdown("\n\n".join(parts))


def _print_comparisons_json(found: list[tuple[str, Comparison]], threshold: float) -> None:
    from edgephi.commands.terminal.console import print_json

    several = len(found) > 1

    def sentences(which: Literal["noise", "differences", "unmatched"]) -> list[str]:
        return [f"{name}: {words}" if several else words for name, one in found for words in getattr(one, which)]

    record = {
        "threshold": threshold,
        "noise": sentences("noise"),
        "differences": sentences("differences"),
        "unmatched": sentences("unmatched"),
        "groups": [{"report": name, **change.as_json()} for name, one in found for change in one.groups],
        "cases": [{"report": name, **change.as_json()} for name, one in found for change in one.cases],
        "worse": sum(len(one.worse()) for _, one in found),
        "untold": sum(len(one.untold()) for _, one in found),
    }
    print_json(record)


def _print_comparisons_csv(found: list[tuple[str, Comparison]]) -> None:
    from edgephi.benchmarks.bench.report.rows import table_csv

    rows = [{"report": name, **change.as_json()} for name, one in found for change in (*one.groups, *one.cases)]
    sys.stdout.write(table_csv(rows))


def history(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="A bundle or an installed model; left out, all that were measured.",
            show_default=False,
            parser=bundle_folder,
            autocompletion=model_names,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A provider, a --device, or a part of its name.", show_default=False),
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(metavar="NAME|SHA256", help="A bundle that is not here.", show_default=False)
    ] = None,
    workload: Annotated[str | None, typer.Option(metavar="NAME", help="One workload.", show_default=False)] = None,
    label: Annotated[str | None, typer.Option(metavar="LABEL", help="One label.", show_default=False)] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="From then on, as 2026-03-31.", show_default=False)
    ] = None,
    every_machine: Annotated[
        bool, typer.Option("--every-machine", help="Also what other machines wrote into this file.")
    ] = False,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw --figure over the runs.", show_default=False)
    ] = None,
    figure: Annotated[Figure, typer.Option(help="Of --svg.")] = "decode",
    as_csv: AsCsv = False,
    as_json: Json = False,
) -> None:
    """Show recorded runs of this machine as figures, each compared with the one before it, and how they moved.

    The one before is the last of the same workload, bundle, device and settings. Below the table, bars show how each
    figure moved, its lowest value as the lowest bar.

    With --json, one object: file (the history), damaged (lines that could not be read), runs: a list of created, label,
    bundle, provider, threads, workload, versions, figures (by name, in seconds, bytes and joules), noise (null or a
    sentence) and change (null for the first of its kind, else what `edgephi bench compare --json` has).
    """
    from edgephi.benchmarks.bench.assemble import bundle_facts
    from edgephi.benchmarks.bench.report.comparison import with_changes
    from edgephi.benchmarks.bench.report.history import history_file, read_history
    from edgephi.benchmarks.bench.report.rows import as_csv as in_csv
    from edgephi.benchmarks.bench.report.trend import Wanted, picture, read_since
    from edgephi.benchmarks.bench.results import Machine
    from edgephi.benchmarks.report import machine
    from edgephi.bundle import read_manifest
    from edgephi.commands.terminal.tables import print_markdown

    sha256 = None if folder is None else bundle_facts(folder, read_manifest(folder)).sha256
    wanted = Wanted(device, bundle, workload, label, None if since is None else read_since(since))
    found = read_history(sha256, None if every_machine else Machine(**machine()))
    runs = [(report, change) for report, change in with_changes(found.reports) if wanted.has(report)]
    reports = [report for report, _ in runs]
    if svg is not None:
        _write_text(svg, picture(reports, figure))
    if as_json:
        _print_history_json(runs, history_file(), found.damaged)
    elif as_csv:
        sys.stdout.write(in_csv([(report.label or report.bundle.name, report) for report in reports]))
    else:
        print_markdown(_history_text(runs, history_file(), found.damaged))


def _history_text(runs: list[tuple[Report, Comparison | None]], file: Path, damaged: int) -> str:
    from edgephi.benchmarks.bench.report.comparison import noise
    from edgephi.benchmarks.bench.report.headline import HEADLINES, headline_cell, headlines, shown
    from edgephi.benchmarks.bench.report.trend import charts
    from edgephi.benchmarks.report import markdown_table

    parts = [f"{len(runs)} runs in {printable(str(file))}"]
    parts[0] += f"\n{damaged} lines could not be read and were left out" if damaged else ""
    if not runs:
        return parts[0]
    numbers = [headlines(report) for report, _ in runs]
    columns = shown(numbers)
    labels = any(report.label for report, _ in runs)
    rows, remarks = [], []
    for (report, change), values in zip(runs, numbers, strict=True):
        known = [report.created, *([report.label or ""] if labels else []), report.bundle.name, report.workload.name]
        known += [report.provider, str(report.threads)]
        cells = [headline_cell(name, values.get(name)) for name in columns]
        noisy = "noisy" if noise(report) else ""
        rows.append([_cell(text) for text in (*known, *cells, noisy, _sentence(change))])
        if change is not None and (change.worse() or change.differences):
            words = [*change.differences, *map(_change_words, change.worse())]
            remarks.append("\n".join([f"{report.created}:", *(f"- {printable(line)}" for line in words)]))
    header = ["measured", *(["label"] if labels else []), "bundle", "workload", "provider", "threads"]
    left = range(len(header) - 1)
    header += [*(HEADLINES[name].title for name in columns), "noise", "against the run before"]
    parts.append(markdown_table(header, rows, left=[*left, len(header) - 2, len(header) - 1]))
    parts += ["\n".join(charts([report for report, _ in runs])), *remarks]
    return "\n\n".join(filter(None, parts))


def _print_history_json(runs: list[tuple[Report, Comparison | None]], file: Path, damaged: int) -> None:
    from edgephi.benchmarks.bench.report.comparison import noise
    from edgephi.benchmarks.bench.report.headline import headlines
    from edgephi.commands.terminal.console import print_json

    record = {
        "file": str(file),
        "damaged": damaged,
        "runs": [
            {
                "created": report.created,
                "label": report.label,
                "bundle": report.bundle.name,
                "provider": report.provider,
                "threads": report.threads,
                "workload": report.workload.name,
                "versions": report.versions,
                "figures": headlines(report),
                "noise": noise(report),
                "change": change.as_json() if change else None,
            }
            for report, change in runs
        ],
    }
    print_json(record)


def table(
    reports: Annotated[
        list[Path],
        typer.Argument(metavar="REPORT...", help="Report folders, report.json files, or folders of such folders."),
    ],
    sort: Annotated[Figure | None, typer.Option(help="The figure whose best comes first.", show_default=False)] = None,
    group_by: Annotated[
        list[GroupBy] | None,
        typer.Option(
            "--group-by",
            metavar="|".join(GroupBy),
            help="A table for each; may be given several times.",
            show_default=False,
        ),
    ] = None,
    as_csv: AsCsv = False,
    as_sql: Annotated[
        bool, typer.Option("--sql", help="Print SQL that fills the table of llama-bench's `-o sql`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List many reports in one table, the best first: a section for each workload.

    prefill is of the prompt nearest to 512 tokens, decode and energy of the case with the least before it; without such
    cases they are the geometric mean over the answers, as first-token is. load and memory are of warm loads. score is
    the Procyon-style score of the workload procyon-style: sqrt(1250 / mean seconds to the first token x 5000 x mean
    tokens/s / 244). UL published that formula for its own prompts and for Phi-3.5-mini. The prompts are others here, so
    a score compares reports in this table and no result of UL's.

    With --sql, every prefill and decode case is one row with llama-bench's columns. n_prompt or n_gen has the tokens;
    avg_ts and stddev_ts are tokens/s over the repetitions, the first new token of a decode case not counted;
    build_commit has the versions of edgephi and onnxruntime. Settings that onnxruntime does not have are null.

    With --json, a list of sections: title, and reports (name, figures by name in seconds, bytes and joules, and noise).
    """
    from edgephi.benchmarks.bench.report import rows
    from edgephi.benchmarks.bench.report.comparison import noise
    from edgephi.benchmarks.bench.report.headline import headlines
    from edgephi.benchmarks.bench.report.league import FACTS, league, read_reports
    from edgephi.commands.terminal.console import print_json
    from edgephi.commands.terminal.tables import print_table

    if as_csv + as_sql + as_json > 1:
        raise UsageError("there is more than one output format", remedy="Pass one of --csv, --sql and --json")
    named = read_reports(reports)
    if as_csv:
        sys.stdout.write(rows.as_csv(named))
        return
    if as_sql:
        sys.stdout.write(rows.as_sql(named))
        return
    sections = league(named, sort=sort, group_by=group_by or ())
    if as_json:
        print_json(
            [
                {
                    "title": section.title,
                    "reports": [
                        {"name": name, "figures": headlines(report), "noise": noise(report)}
                        for name, report in section.reports
                    ],
                }
                for section in sections
            ]
        )
        return
    for index, section in enumerate(sections):
        if index:
            sys.stdout.write("\n")
        left = (*FACTS, "remarks")
        right = [heading for heading in section.headings if heading not in left or heading == "threads"]
        print_table(section.headings, section.rows, right=right, title=section.title)


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(
            f"the picture cannot be written: {error.strerror or error}", where=path, remedy="Choose another --svg"
        ) from error


def _share(percent: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", percent.strip())
    if match is None:
        raise UsageError(f"--fail-over is {percent!r}", remedy="Give a percentage, as 5%")
    return float(match[1]) / 100


def _sentence(change: Comparison | None) -> str:
    if change is None:
        return "first of its kind"
    if worse := len(change.worse()):
        return f"{worse} figures worse"
    every = len((*change.groups, *change.cases))
    return (
        f"nothing worse seen, {len(change.untold())} of {every} cannot be told" if change.untold() else "nothing worse"
    )


def _change_words(change: Change) -> str:
    return f"worse: {change.case}, {change.metric}, {change.words.partition(',')[0]}"


def _cell(text: str) -> str:
    return printable(text).replace("|", r"\|")
