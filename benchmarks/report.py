"""What the measuring scripts share: tables, JSON, facts about the machine, progress, errors as one sentence."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgephi.benchmarks import arguments
from edgephi.devices.cpu_features import cpu_name
from edgephi.errors import EdgephiError, OutputError, UsageError


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """A Markdown table, padded to be readable as plain text too.

    Args:
        left: indices of the columns that are aligned on the left; the others are on the right.
    """
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    rule = ["-" * width if index in left else "-" * (width - 1) + ":" for index, width in enumerate(widths)]

    def row(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    return "\n".join([row(header), row(rule), *map(row, rows)])


def write_json(path: Path, report: Mapping[str, object]) -> None:
    """Write a report (UTF-8, indented).

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(
            f"the report cannot be written: {error.strerror or error}", where=path, remedy="Choose another --json"
        ) from error


def machine() -> dict[str, str]:
    """Processor, cores, memory, system and Python: what a number is worth nothing without."""
    import psutil

    return {
        "cpu": cpu_name(),
        "cores": f"{psutil.cpu_count(logical=False) or '?'} physical, {os.cpu_count() or '?'} logical",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def library_versions(*names: str) -> dict[str, str]:
    """Installed versions; a library that is not installed is left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def circumstances(*libraries: str) -> dict[str, str]:
    """The machine, and the versions of edgephi and of the libraries that were measured."""
    return machine() | library_versions("edgephi", *libraries)


def in_one_line(facts: Mapping[str, str]) -> str:
    """{'cpu': 'X', 'python': '3.11'} → 'cpu X, python 3.11'."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def add_turns(parser: argparse.ArgumentParser, *, rounds: int, prompt: int, tokens: int) -> None:
    """The options of scripts that decode in turns, with these defaults."""
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"rounds in turns ({rounds})")
    parser.add_argument("--prompt", type=int, default=prompt, metavar="N", help=f"tokens of the prompt ({prompt})")
    parser.add_argument("--tokens", type=int, default=tokens, metavar="N", help=f"tokens to decode ({tokens})")
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="also write the numbers, unrounded")


@contextmanager
def progress(task: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar with the time left, on stderr and only on a terminal; yields a function to call after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        identity = bar.add_task(task, total=total)
        yield lambda: bar.advance(identity)


def run(main: Callable[[], None]) -> None:
    """Run a script. Exit status: 0 done, 1 error, 2 usage, 130 interrupted."""
    try:
        main()
    except EdgephiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
