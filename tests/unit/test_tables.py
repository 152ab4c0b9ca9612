"""Tables: drawn on a terminal, Markdown for files and pipes; no cell drives the terminal or breaks the table."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial

import pytest

from edgephi.commands.terminal.console import waiting
from edgephi.commands.terminal.tables import print_facts, print_markdown, print_table

TABLE = partial(print_table, ("Name", "Count"), [("a|b", "1"), ("\x1b[31mred", "22")], right=("Count",), title="Things")
PAGE = "Before\n\n| case | ms |\n| ---- | --: |\n| a\\|b \x1b[31m |  1 |\n\n- after"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


def on_a_screen(print_: Callable[[], None]) -> list[str]:
    with redirect_stdout(Screen()) as screen:
        print_()
    return [line.rstrip() for line in screen.getvalue().splitlines()]


def in_a_pipe(print_: Callable[[], None]) -> str:
    with redirect_stdout(io.StringIO()) as pipe:
        print_()
    return pipe.getvalue()


def test_a_pipe_gets_markdown() -> None:
    assert in_a_pipe(TABLE).splitlines() == [
        "Things",
        "",
        "| Name        | Count |",
        "| ----------- | ----: |",
        r"| a\|b        |     1 |",
        r"| \x1b[31mred |    22 |",
    ]


def test_a_terminal_gets_columns() -> None:
    assert on_a_screen(TABLE) == [
        "Things",
        "Name         Count",
        "a|b              1",
        r"\x1b[31mred     22",
    ]


def test_a_narrow_terminal_cuts_what_may_be_cut() -> None:
    name, source = "phi-4-mini-" * 5, "microsoft/Phi-4-mini-instruct"  # 86 columns with the gap, of 80
    table = partial(print_table, ("Long name", "From"), [(name, source)])
    assert on_a_screen(partial(table, cut=("From",)))[1] == f"{name}  microsoft/Phi-4-mini-i…"
    assert len(on_a_screen(table)) == 3, "without, a second line has the rest"
    assert source in in_a_pipe(partial(table, cut=("From",)))


def test_facts_have_no_headings_on_a_terminal() -> None:
    facts = partial(print_facts, [("System", "Linux"), ("", "more")])
    assert [line.split() for line in on_a_screen(facts)] == [["System", "Linux"], ["more"]]


def test_a_page_is_drawn_on_a_terminal_and_itself_in_a_pipe() -> None:
    lines = on_a_screen(partial(print_markdown, PAGE))
    assert [line.split() for line in lines] == [
        ["Before"], [], ["case", "ms"], ["a|b", r"\x1b[31m", "1"], [], ["-", "after"]
    ]  # fmt: skip
    assert in_a_pipe(partial(print_markdown, PAGE)) == PAGE.replace("\x1b", "\\x1b") + "\n"


def test_waiting_is_told_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    said = {}
    for stream in (Screen(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        with waiting("loading \x1b[31mdemo"):
            pass
        said[type(stream)] = stream.getvalue()
    assert r"loading \x1b[31mdemo" in said[Screen] and said[io.StringIO] == ""
