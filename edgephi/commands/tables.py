"""Tables: by rich on a terminal, Markdown where the output is read by something else."""

from __future__ import annotations

from collections.abc import Sequence

from edgephi.errors import printable


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table to stdout.

    Args:
        right: columns whose cells stand to the right, on a terminal; in Markdown all but the first do.
    """
    from edgephi.benchmarks.report import markdown_table
    from edgephi.commands.console import stdout

    console = stdout()
    cells = [[printable(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
        console.print(markdown_table(header, escaped), soft_wrap=True)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in header:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)
