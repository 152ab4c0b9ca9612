"""Tables for people: drawn by rich on a terminal, as Markdown where a file or a program reads."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from typing import Literal

from edgephi.errors import printable

_CELL_BORDER = re.compile(r"(?<!\\)\|")


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    title: str = "",
    show_headings: bool = True,
    cut: Collection[str] = (),
) -> None:
    """Print a table to stdout. Cells may hold anything: what drives a terminal comes out as escapes.

    Args:
        right: headings of the columns that are aligned on the right, such as numbers.
        title: a line above it.
        show_headings: on a terminal; a table of Markdown always has them.
        cut: headings of the columns whose words a narrow terminal cuts short, so that the others stay whole on one
            line; without any, all columns go on below.
    """
    lines = [[printable(cell) for cell in row] for row in rows]
    aligned = [heading in right for heading in headings]
    if sys.stdout.isatty():
        if title:
            _print_bold(title)
        _draw(headings, lines, aligned, show_headings, cut)
        return
    from edgephi.benchmarks.report import markdown_table

    above = f"{printable(title)}\n\n" if title else ""
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    left = [index for index, is_right in enumerate(aligned) if not is_right]
    sys.stdout.write(f"{above}{markdown_table(headings, escaped, left=left)}\n")


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values to stdout; a name is empty where the value belongs to the one above."""
    print_table(("Name", "Value"), facts, show_headings=False)


def print_markdown(text: str) -> None:
    """Print a page to stdout; on a terminal its tables are drawn and its other lines stay as they are."""
    if not sys.stdout.isatty():
        sys.stdout.write("\n".join(map(printable, text.rstrip("\n").split("\n"))) + "\n")
        return
    from edgephi.commands.terminal.console import stdout

    for is_table, block in groupby(text.rstrip("\n").split("\n"), lambda line: line.startswith("|")):
        lines = list(block)
        if is_table and len(lines) > 1:
            head, rule, *rows = (_cells(line) for line in lines)
            _draw(head, [list(map(printable, row)) for row in rows], [cell.endswith(":") for cell in rule], True)
        else:
            for line in lines:
                stdout().print(printable(line), soft_wrap=True)


def _cells(line: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in _CELL_BORDER.split(line.strip())[1:-1]]


def _draw(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[bool],
    show_headings: bool,
    cut: Collection[str] = (),
) -> None:
    from rich.table import Table
    from rich.text import Text

    from edgephi.commands.terminal.console import stdout

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=show_headings)
    for heading, is_right in zip(headings, right, strict=True):
        overflow: Literal["fold", "ellipsis"] = "ellipsis" if heading in cut else "fold"
        table.add_column(
            printable(heading),
            justify="right" if is_right else "left",
            overflow=overflow,
            no_wrap=bool(cut) and heading not in cut,  # only the others give way
        )
    for row in rows:
        # without headings the first column is one
        styles = ["" if show_headings or index else "bold" for index in range(len(row))]
        table.add_row(*(Text(cell, style=style) for cell, style in zip(row, styles, strict=True)))
    stdout().print(table)


def _print_bold(line: str) -> None:
    from rich.text import Text

    from edgephi.commands.terminal.console import stdout

    stdout().print(Text(printable(line), style="bold"), soft_wrap=True)
