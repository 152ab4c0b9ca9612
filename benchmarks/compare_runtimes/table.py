"""A report of the peers as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from edgephi.benchmarks.bench.results import Figure
from edgephi.benchmarks.compare_runtimes.goals import BOUNDS
from edgephi.benchmarks.compare_runtimes.results import ComparisonReport, ContenderResult, Goal, Ratio, Speed
from edgephi.benchmarks.report import in_one_line, markdown_table

MISSING = "–"


def markdown(report: ComparisonReport) -> str:
    """Figures, notes, ratios and goals."""
    parts = [f"# {report.weights}: peers in one run", figures_table(report), _method(report)]
    parts.append("\n".join(_notes(report.contenders)))
    if report.ratios:
        parts += ["## edgephi ÷ peer", ratios_table(report.ratios)]
        parts.append("Medians (quartiles) of the rounds' ratios. Load and memory: less is better.")
    if report.goals:
        parts += ["## Goals", goals_table(report.goals)]
    parts.append(in_one_line(report.machine))
    return "\n\n".join(parts) + "\n"


def _method(report: ComparisonReport) -> str:
    settings = report.settings
    source = settings.text or "random token ids"
    said = (
        f"Medians (quartiles) of {settings.rounds} rounds in random order, tokens per second, "
        f"{settings.threads} threads for everybody; prompts: {source}. Decode: {settings.new_tokens} greedy tokens. "
        f"Load: median of {settings.loads} new processes, files cached. "
        "Memory: private + file-backed, after a first answer; imports: private, before loading."
    )
    if not settings.windows:
        return f"{said} No KL divergence: it says nothing about random weights."
    windows = f"{settings.windows} windows of {settings.window_length} tokens of {source}"
    return f"{said} KL in nats to the float32 model, {windows}."


def figures_table(report: ComparisonReport) -> str:
    """One row a contender; one without any figure is there with its reason."""
    prompts, depths = report.settings.prompts, report.settings.depths
    header = (
        "weights and runtime",
        "MB",
        "KL",
        "top-1",
        *(f"prefill {count}" for count in prompts),
        *(f"decode at {depth}" for depth in depths),
        "load s",
        "memory MB",
        "imports MB",
        "CPU of others",
    )
    rows = []
    for one in report.contenders:
        quality, loading = one.quality, one.loading
        rows.append(
            (
                one.name,
                MISSING if one.bytes is None else f"{one.bytes / 1e6:,.0f}",
                MISSING if quality is None else f"{quality.kl_mean:.2g}",
                MISSING if quality is None else f"{100 * quality.top1_agreement:.1f} %",
                *(_speed(one.prefill, count) for count in prompts),
                *(_speed(one.decode, max(1, depth)) for depth in depths),
                MISSING if loading is None else f"{loading.load_s.median:.2f}",
                MISSING if loading is None else _memory(loading.private_answered, loading.file_backed_answered),
                MISSING if loading is None else _memory(loading.private_imported, None),
                MISSING if one.others_cpu_share is None else f"{100 * one.others_cpu_share:.0f} %",
            )
        )
    return markdown_table(header, rows)


def _speed(speeds: Sequence[Speed], tokens: int) -> str:
    for speed in speeds:
        if speed.tokens == tokens:
            found = speed.figure
            return f"{found.median:.0f} ({found.low:.0f}–{found.high:.0f})"
    return MISSING


def _memory(private: Figure | None, file_backed: Figure | None) -> str:
    if private is None:
        return MISSING
    return f"{private.median / 1e6:,.0f}" + ("" if file_backed is None else f" + {file_backed.median / 1e6:,.0f}")


def _notes(contenders: Sequence[ContenderResult]) -> list[str]:
    lines = []
    for one in contenders:
        versions = in_one_line(one.libraries)
        lines.append(f"- {one.name}: {one.note}" + (f" ({versions})" if versions else ""))
        if one.reason:
            lines.append(f"  **not measured**: {one.reason}")
        if one.answer is not None:
            lines.append(f"  answers: {one.answer!r}")
    return lines


def ratios_table(ratios: Sequence[Ratio]) -> str:
    """One row for two contenders, one column for a figure."""
    keys = list(dict.fromkeys((ratio.metric, ratio.tokens) for ratio in ratios))
    cells: dict[tuple[str, str], dict[tuple[str, int | None], str]] = {}
    for ratio in ratios:
        text = f"{ratio.ratio:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
        cells.setdefault((ratio.ours, ratio.theirs), {})[ratio.metric, ratio.tokens] = text
    header = ("edgephi ÷ peer", *(figure_title(*key) for key in keys))
    rows = [
        (f"{ours} ÷ {theirs}", *(found.get(key, MISSING) for key in keys)) for (ours, theirs), found in cells.items()
    ]
    return markdown_table(header, rows)


def goals_table(goals: Sequence[Goal]) -> str:
    """What was wanted, what came, and by how much it was missed."""
    header = ("goal", "against", "wanted", "measured", "")
    return markdown_table(
        header,
        [(f"{goal.ours}, {figure_title(goal.metric, goal.tokens)}", goal.theirs, *_verdict(goal)) for goal in goals],
    )


def _verdict(goal: Goal) -> tuple[str, str, str]:
    most = goal.metric in BOUNDS
    wanted = f"{'≤' if most else '≥'} {goal.bound:g}"
    if goal.met:
        unknown = goal.no_worse_kl is None and not most
        return wanted, f"{goal.ratio:.2f}", "met (KL not measured)" if unknown else "met"
    missed = []
    if (goal.ratio > goal.bound) if most else (goal.ratio < goal.bound):
        missed.append(f"by {100 * abs(goal.ratio / goal.bound - 1):.0f} %")
    if goal.no_worse_kl is False:
        missed.append("KL is worse")
    return wanted, f"{goal.ratio:.2f}", f"missed: {', '.join(missed)}"


def figure_title(metric: str, tokens: int | None) -> str:
    """prefill, 512 → prefill 512."""
    if tokens is None:
        return metric
    return f"prefill {tokens}" if metric == "prefill" else f"decode at {0 if tokens == 1 else tokens}"
