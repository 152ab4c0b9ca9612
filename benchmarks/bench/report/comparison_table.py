"""Two reports side by side as Markdown: noise first, then the table, the verdict, and what else changed."""

from __future__ import annotations

from edgephi.benchmarks.bench.report.comparison import Change, Comparison
from edgephi.benchmarks.bench.report.table import LABELS, in_unit
from edgephi.benchmarks.report import markdown_table

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def ordinal(index: int) -> str:
    """0 → first, 1 → second, 10 → number 11."""
    return ORDINALS[index] if index < len(ORDINALS) else f"number {index + 1}"


def comparison_markdown(found: Comparison, threshold: float, second: str = "second") -> str:
    """A comparison as Markdown.

    Args:
        second: what the later report is called in the headings.
    """
    header = ("case", "figure", "first", second, f"{second} over first", "in words", "interval", "verdict")
    rows = [_row(change) for change in (*found.groups, *found.cases)]
    parts = [f"NOISY: {words.replace('second report', f'{second} report')}." for words in found.noise]
    parts += [markdown_table(header, rows) if rows else "The reports have no case in common."]
    parts += [f"{len(found.worse())} figures are worse by more than {100 * threshold:g} %, beyond noise."]
    if untold := found.untold():
        noisy = sum(change.verdict == "too noisy to tell" for change in untold)
        counts = [f"{noisy} are too noisy"] if noisy else []
        counts += [f"{len(untold) - noisy} have too few repetitions"] if len(untold) > noisy else []
        parts.append(
            f"Of {len(rows)} figures, {' and '.join(counts)} to tell a change of {100 * threshold:g} %. "
            "Measure again on a quiet machine or with more --repetitions."
        )
    if found.differences:
        parts.append("What else changed:\n" + "\n".join(f"- {words}" for words in found.differences))
    if found.unmatched:
        parts.append("In one report only, or on another prompt: " + ", ".join(found.unmatched))
    return "\n\n".join(parts)


def _row(change: Change) -> tuple[str, ...]:
    one = change.shift
    interval = f"{one.low:.3f} to {one.high:.3f} ({100 * one.confidence:.0f} %)"
    values = (_four_digits(in_unit(change.metric, value)) for value in (change.first, change.second))
    return (
        change.case,
        LABELS[change.metric],
        *values,
        f"{change.ratio:.3f}",
        change.words,
        interval,
        change.verdict,
    )


def _four_digits(value: float) -> str:
    """One digit more than the ratio has, so that a reader who divides gets the ratio that is printed."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
