"""The terminal: consoles, progress, and numbers for people."""

from __future__ import annotations

import json
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from edgephi.errors import printable

if TYPE_CHECKING:
    from edgephi.commands.terminal.safe_console import PlainConsole
    from edgephi.runtime.answer import Answer
    from edgephi.runtime.stream import Stream


def stdout() -> PlainConsole:
    """The console for results."""
    from edgephi.commands.terminal.safe_console import PlainConsole

    return PlainConsole(sys.stdout)


def stderr() -> PlainConsole:
    """The console for everything that is not the result: progress, statistics, notes."""
    from edgephi.commands.terminal.safe_console import PlainConsole

    return PlainConsole(sys.stderr)


def print_json(record: object, *, indent: int | None = None) -> None:
    """Print a record, for programs."""
    print_json_text(json.dumps(record, indent=indent, ensure_ascii=False))


def print_json_text(text: str) -> None:
    """Print JSON, for programs; what drives a terminal is written as `\\u009b`, which means the same to a parser."""
    # inside strings JSON has no line breaks, so those that are there lie between values
    lines = ("".join(map(_escaped_in_json, line)) for line in text.rstrip("\n").split("\n"))
    sys.stdout.write("\n".join(lines) + "\n")


def _escaped_in_json(character: str) -> str:
    return character if printable(character) == character else json.dumps(character)[1:-1]


@contextmanager
def byte_progress(task: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar with the time left, on stderr and only on a terminal; yields a function told (bytes done, bytes in all)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = stderr()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        identity = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(identity, completed=done, total=total)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A line on stderr, on a terminal only, that something is under way; it goes when that is done."""
    from rich.text import Text

    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(Text(what), spinner="line"):
        yield


def format_bytes(count: int) -> str:
    """1234567 → '1.2 MB' (powers of 1000)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_count(count: int) -> str:
    """135000000 → '135M'."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


# of bidirectional writing only what overrides it or opens a span; the marks that right-to-left scripts need stay
_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def harmless(text: str) -> str:
    """A model's answer with what drives a terminal, or turns the direction of writing, as escapes.

    Line breaks and tabs stay, and so do joiners and marks, which emoji, Arabic and Indic scripts are written with.
    """
    return "".join(
        printable(c) if c in _OVERRIDES or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") else c
        for c in text
    )


def print_stream(stream: Stream) -> Answer:
    """Write an answer to stdout while it is made. Ctrl-C cancels the answer, not the program."""
    output = sys.stdout
    with _interrupt_cancels(stream):
        for piece in stream:
            output.write(harmless(piece))
            output.flush()
    output.write("\n")
    output.flush()
    return stream.result()


def statistics(answer: Answer) -> str:
    """One line about an answer: tokens, those that were found or guessed, times, how it ended."""
    reused = f" ({answer.reused_tokens} from the cache)" if answer.reused_tokens else ""
    guessed = f" ({answer.accepted_tokens} of {answer.guessed_tokens} guesses right)" if answer.guessed_tokens else ""
    parts = [
        f"{answer.prompt_tokens} prompt token{'' if answer.prompt_tokens == 1 else 's'}{reused}",
        f"{answer.new_tokens} new{guessed}",
    ]
    if answer.time_to_first_token_s is not None:
        parts.append(f"first after {answer.time_to_first_token_s:.2f} s")
    if answer.decode_tokens_per_s is not None:
        parts.append(f"{answer.decode_tokens_per_s:.1f} tokens/s")
    if answer.recomputed_tokens:
        parts.append(f"{answer.recomputed_tokens} computed again at the model's rope switch")
    if answer.prefill_provider != answer.provider:
        parts.append(f"prompt on {answer.prefill_provider}, tokens on {answer.provider}")
    elif answer.provider != "cpu" or answer.rejected:
        parts.append(f"on {answer.provider}")
    return ", ".join([*parts, f"{answer.total_s:.2f} s in all", answer.finish])


def print_statistics(answer: Answer) -> None:
    """The statistics line, dim, on stderr; before it, what the device that was asked for lacks."""
    for reason in answer.rejected:
        sentence = printable(f"not on the device that was asked for: {reason}")
        stderr().print(sentence, style="yellow", soft_wrap=True)
    stderr().print(statistics(answer), style="dim", soft_wrap=True)


@contextmanager
def _interrupt_cancels(stream: Stream) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        stream.cancel()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
