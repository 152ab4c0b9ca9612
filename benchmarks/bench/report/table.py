"""The Markdown table, and how figures are written for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgephi.benchmarks.bench.report.comparison import noise
from edgephi.benchmarks.bench.results import CaseResult, Ceiling, Figure, Group, Metric, Reading, Report, Roofline
from edgephi.benchmarks.report import in_one_line, markdown_table

LABELS: dict[Metric, str] = {
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
    "time_to_first_token_s": "first token, ms",
    "inter_token_p50_s": "token p50, ms",
    "inter_token_p95_s": "p95, ms",
    "inter_token_p99_s": "p99, ms",
    "energy_per_prompt_j": "J/prompt",
    "energy_per_token_j": "J/token",
    "cpu_share": "CPU share, %",
    "load_s": "load, ms",
    "load_to_first_token_s": "load to first token, ms",
    "steady_private_bytes": "private memory, MB",
    "steady_file_bytes": "file-backed, MB",
    "peak_private_bytes": "peak private, MB",
    "peak_resident_bytes": "peak resident, MB",
    "bandwidth_share": "of bandwidth, %",
    "int8_share": "of int8 peak, %",
}

COLUMNS: dict[Group, tuple[Metric, ...]] = {
    "load": (
        "load_s",
        "load_to_first_token_s",
        "steady_private_bytes",
        "steady_file_bytes",
        "peak_private_bytes",
        "peak_resident_bytes",
    ),
    "prefill": ("prefill_tokens_per_s", "time_to_first_token_s", "int8_share", "energy_per_prompt_j", "cpu_share"),
    "decode": (
        "decode_tokens_per_s",
        "inter_token_p50_s",
        "inter_token_p95_s",
        "inter_token_p99_s",
        "bandwidth_share",
        "energy_per_token_j",
        "cpu_share",
    ),
    "answer": (
        "time_to_first_token_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "inter_token_p50_s",
        "inter_token_p95_s",
        "inter_token_p99_s",
        "energy_per_prompt_j",
        "energy_per_token_j",
        "cpu_share",
    ),
    "speculation": ("decode_tokens_per_s", "inter_token_p99_s", "energy_per_token_j", "cpu_share"),
}

NOT_MEASURED = "not measured"
SPREAD = "Median ± half the distance between the quartiles, to the digits that noise leaves; ± 0: below the last one."
MOST_DIGITS = 4
"""Of a median, however quiet its repetitions were."""


def in_unit(metric: Metric, value: float) -> float:
    """A value in the unit of its label."""
    if metric.endswith(("tokens_per_s", "_j")):
        return value
    if metric.endswith("_s"):
        return 1e3 * value
    return value / 1e6 if metric.endswith("_bytes") else 100 * value


def digits(value: float) -> str:
    """Three significant digits, and all of those before the point: 0.0123, 1.23, 12.3, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(metric: Metric, found: Figure | None) -> str:
    """Median, and half the distance of the quartiles; 'not measured' where there is nothing."""
    if found is None:
        return NOT_MEASURED
    value = in_unit(metric, found.median)
    if len(found.values) < 2:
        return digits(value)
    return " ± ".join(with_spread(value, in_unit(metric, (found.high - found.low) / 2)))


def with_spread(value: float, spread: float) -> tuple[str, str]:
    """Both to the last digit that the spread leaves: 1,319.4 and 161 are 1,320 and 160, 100 and 2e-10 are 100.0 and 0.

    The spread has one significant digit, or two that begin with 1; the value at least one and at most MOST_DIGITS.
    """
    if value == 0:
        return "0", digits(float(f"{spread:.2g}"))
    leading = math.floor(math.log10(abs(value)))
    place = leading - MOST_DIGITS + 1
    if spread > 0:
        tens = math.floor(math.log10(spread))
        place = max(place, tens - 1 if spread / 10.0**tens < 1.95 else tens)
    place = min(place, leading)
    shown = [f"{round(one, -place):,.{max(0, -place)}f}" for one in (value, spread)]
    return shown[0], shown[1] if float(shown[1].replace(",", "")) else "0"


def title(case: CaseResult) -> str:
    """A case's name with what a reader must know about it."""
    notes = [f"{case.prompt_tokens} prompt tokens"] if case.group in ("answer", "speculation") else []
    notes += ["noisy"] if case.noisy else []
    return f"{case.name} ({', '.join(notes)})" if notes else case.name


def tables(report: Report) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Header and rows of a table for every group that has cases; columns in which nothing was measured are left out."""
    found = []
    for group in COLUMNS:
        columns = _measured(report, group)
        rows = [_row(case, columns) for case in report.cases if case.group == group]
        if rows:
            found.append(((group, *(LABELS[metric] for metric in columns)), rows))
    return found


def left_out(report: Report) -> list[str]:
    """The headings of the columns that no table has because nothing was measured."""
    groups = {case.group for case in report.cases}
    empty = [metric for group in groups for metric in COLUMNS[group] if metric not in _measured(report, group)]
    measured = {metric for group in groups for metric in _measured(report, group)}
    return [label for metric, label in LABELS.items() if metric in empty and metric not in measured]


def _measured(report: Report, group: Group) -> tuple[Metric, ...]:
    """At least the first column: a table of cases without figures says of each why it has none."""
    cases = [case for case in report.cases if case.group == group]
    first, *rest = COLUMNS[group]
    return (first, *(metric for metric in rest if any(metric in case.figures for case in cases)))


def facts(report: Report) -> list[tuple[str, str]]:
    """What the numbers need to be worth something: name and sentence."""
    conditions, bundle, method, quality = report.conditions, report.bundle, report.workload, report.quality
    energy = conditions.energy
    joules = NOT_MEASURED if energy.idle_w is None else f"{energy.source}, {energy.idle_w:.2f} W idle subtracted"
    temperature = NOT_MEASURED
    if conditions.temperature_start_c is not None and conditions.temperature_end_c is not None:
        temperature = f"{conditions.temperature_start_c:.0f} °C before, {conditions.temperature_end_c:.0f} °C after"
    repetitions = f"{method.repetitions} repetitions, {method.warmups} warm-up, {method.pause_s:g} s pause"
    return [
        *([("label", report.label)] if report.label else []),
        *([("stopped", f"{report.stopped}: cases or repetitions are missing")] if report.stopped else []),
        ("bundle", f"{bundle.name}: {bundle.family}, {bundle.precision}, {bundle.stored_bytes / 1e6:,.1f} MB"),
        (
            "ran on",
            f"{report.hardware or 'CPU'}: {', '.join((*report.providers, threads_words(report)))}",
        ),
        ("machine", in_one_line(report.machine.model_dump())),
        ("versions", in_one_line(report.versions)),
        ("workload", f"{method.name}: {repetitions}, seed {method.seed}"),
        (
            "quality contract",
            f"held, {quality.golden_tokens} golden tokens" if quality.contract == "held" else "not recorded",
        ),
        *_limits(report.roofline),
        ("power", f"{conditions.power_source or 'source unknown'}, {conditions.power_mode or 'mode unknown'}"),
        ("energy", joules + (f" ({energy.reason})" if energy.reason else "")),
        ("temperature", temperature),
        *_traced(report.trace),
        (
            "throttled",
            NOT_MEASURED if conditions.throttle_events is None else f"{conditions.throttle_events} times",
        ),
        ("other processes", _of_all(conditions.others_cpu_share)),
        ("measured", f"{report.created}, in {report.seconds:,.0f} s"),
    ]


def _traced(trace: Sequence[Reading]) -> list[tuple[str, str]]:
    """The range of what was read between runs, by name; nothing for what the system does not say."""
    degrees = [one.temperature_c for one in trace if one.temperature_c is not None]
    clocks = [one.clock_mhz / 1e3 for one in trace if one.clock_mhz is not None]
    found = [("temperature over the run", f"{min(degrees):.0f} to {max(degrees):.0f} °C")] if degrees else []
    return found + ([("clock over the run", f"{min(clocks):.2f} to {max(clocks):.2f} GHz")] if clocks else [])


def _of_all(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.1f} % of all processors"


def threads_words(report: Report) -> str:
    """How many threads computed, and whether they waited actively."""
    if not report.threads:
        return "threads not stated"
    words = [f"{report.threads} threads"]
    if report.spinning is not None:
        words.append(f"spinning {'on' if report.spinning.on else 'off'} ({report.spinning.because})")
    if report.prefill == "integers":
        words.append("prompts by integers")
    return ", ".join(words)


def _limits(limits: Roofline | None) -> list[tuple[str, str]]:
    if limits is None:
        return []
    read = f"{limits.weight_bytes / 1e6:,.1f} MB and {limits.cache_bytes_per_token / 1e3:,.1f} kB for each token before"
    multiplied = f"{limits.token_operations / 1e9:.3g} billion a token, {limits.head_operations / 1e9:.3g} for the head"
    return [
        ("memory bandwidth, GB/s", f"{_per_s(limits.bandwidth, 1e9)} ({limits.bandwidth.method})"),
        ("int8 peak, GOP/s", f"{_per_s(limits.int8, 1e9)} ({limits.int8.method})"),
        ("block product, GOP/s", f"{_per_s(limits.matmul_nbits, 1e9)} ({limits.matmul_nbits.method})"),
        ("a decode step reads", read),
        ("integer operations of a prompt", multiplied if limits.token_operations else "none"),
    ]


def _per_s(ceiling: Ceiling, unit: float) -> str:
    one = ceiling.per_s
    best = f"{digits(max(one.values) / unit)} at best"
    if is_outlier(one):
        best += ", an outlier"
    return f"{best}, quartiles {digits(one.low / unit)} and {digits(one.high / unit)}"


def is_outlier(found: Figure) -> bool:
    """Whether the highest value lies far out: three times the distance of the quartiles above the upper one, or more
    (Tukey 1977, Exploratory Data Analysis, 2D)."""
    return max(found.values) >= found.high + 3 * (found.high - found.low) and max(found.values) > found.high


def cautions(report: Report) -> list[str]:
    """What a reader must know before any figure, as sentences: noise, what is missing, ceilings that are outliers."""
    found = []
    if words := noise(report):
        found.append(f"Noisy: {words}. Differences between figures may be theirs.")
    if report.stopped:
        found.append(f"Stopped: {report.stopped}. Cases or repetitions are missing.")
    if wrong := [case.name for case in report.cases if case.state == "wrong answers"]:
        found.append(f"Wrong answers: repetitions of one prompt disagreed in {', '.join(wrong)}, so no figure counts.")
    limits = report.roofline
    shares = {metric for case in report.cases for metric in case.figures}
    if limits is not None:
        named: tuple[tuple[Metric, str, Ceiling, str], ...] = (
            ("bandwidth_share", "memory bandwidth", limits.bandwidth, "GB/s"),
            ("int8_share", "int8 peak", limits.int8, "GOP/s"),
        )
        for metric, name, ceiling, unit in named:
            if metric in shares and is_outlier(ceiling.per_s):
                best, low, high = (
                    digits(one / 1e9) for one in (max(ceiling.per_s.values), ceiling.per_s.low, ceiling.per_s.high)
                )
                found.append(
                    f"The best reading of the {name} is an outlier: {best} {unit}, quartiles {low} and {high}. "
                    "Shares are of this reading, so they may be too low."
                )
    return found


def notes(report: Report) -> list[str]:
    """Cases without figures, and why."""
    return [f"{case.name}: {case.state}, {case.reason}" for case in report.cases if case.reason]


def spread_and_gaps(report: Report) -> str:
    """How figures are written, and which columns are missing."""
    empty = left_out(report)
    return f"{SPREAD} Not measured in any case, and left out: {'; '.join(empty)}." if empty else SPREAD


def markdown(report: Report) -> str:
    """The report as Markdown: tables, derived numbers, notes, facts."""
    parts = ["\n".join(f"- **{_plain(words)}**" for words in found)] if (found := cautions(report)) else []
    parts += [
        markdown_table(header, [[_plain(text) for text in row] for row in rows]) for header, rows in tables(report)
    ]
    if report.derived:
        rows = [(_plain(one.name), f"{one.value:,.3g}", one.formula) for one in report.derived]
        parts.append(markdown_table(("derived", "value", "how"), rows))
    parts.append(spread_and_gaps(report))
    if remarks := notes(report):
        parts.append("\n".join(f"- {_plain(remark)}" for remark in remarks))
    parts.append("\n".join(f"- {name}: {_plain(value)}" for name, value in facts(report)))
    return "\n\n".join(parts) + "\n"


def _row(case: CaseResult, columns: Sequence[Metric]) -> tuple[str, ...]:
    if case.state == "wrong answers":
        return (title(case), "wrong answers", *("–" for _ in columns[1:]))
    return (title(case), *(cell(metric, case.figures.get(metric)) for metric in columns))


def _plain(text: str) -> str:
    """One line that breaks no table, whatever a bundle's or a workload's name holds."""
    return " ".join(text.split()).replace("|", "/")
