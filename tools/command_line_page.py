"""Write docs/command-line.md from what `edgephi --help` shows.

    python tools/command_line_page.py

The page holds each verb's description, arguments and options. They are read from the functions behind the command, so
that the page does not depend on how a version of typer lays out its help. `tests/unit/test_docs.py` checks that the
page is current, and that it names the options that `--help` names.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from typer import Typer
from typer.models import ArgumentInfo, OptionInfo, ParameterInfo

PAGE = Path(__file__).resolve().parents[1] / "docs" / "command-line.md"
HEAD = """\
# Command line

This page is generated from the command's own help; `edgephi VERB --help` shows the same text.

Exit status: 0 done, 1 an error, 2 wrong usage, 130 interrupted. An error is one sentence on stderr that says what
happened, where, and what to do next; `--debug` anywhere on the line shows the traceback as well. Answers and JSON go to
stdout, statistics and progress to stderr.
"""


def page() -> str:
    """The whole page."""
    from edgephi.commands.app import app

    return HEAD + "".join(f"\n{part}" for part in sections(app, "edgephi", 2))


def sections(app: Typer, name: str, level: int) -> Iterator[str]:
    """A section for each verb of an application, then for its groups and their verbs."""
    for command in app.registered_commands:
        assert command.callback is not None
        verb = command.name or command.callback.__name__
        yield section(f"{name} {verb}", command.callback, level)
    for group in app.registered_groups:
        inner = group.typer_instance
        assert inner is not None
        if group.hidden is True:
            continue
        described = inner.info.help
        assert isinstance(described, str)
        yield f"{'#' * level} {name} {group.name}\n\n{paragraphs(described)}\n"
        yield from sections(inner, f"{name} {group.name}", level + 1)


def section(name: str, callback: Callable[..., object], level: int) -> str:
    """Heading, usage, description and tables of one verb."""
    described = list(parameters(callback))
    arguments = [parameter for parameter in described if isinstance(parameter[1], ArgumentInfo)]
    options = [parameter for parameter in described if isinstance(parameter[1], OptionInfo)]
    usage = " ".join([name, *(usage_of(*argument) for argument in arguments), *(["[OPTIONS]"] if options else [])])
    parts = [f"{'#' * level} {name}", f"```text\n{usage}\n```", paragraphs(inspect.getdoc(callback) or "")]
    if arguments:
        rows = [f"| `{metavar(*argument)}` | {sentence(*argument)} |" for argument in arguments]
        parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
    if options:
        rows = [f"| {spelled(*option)} | {sentence(*option)} |" for option in options]
        parts.append("\n".join(["| option | |", "|---|---|", *rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


def parameters(callback: Callable[..., object]) -> Iterator[tuple[str, ParameterInfo, Any, object]]:
    """(name, typer's description, type, default) of each parameter."""
    hints = typing.get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, *extra = typing.get_args(hints[name])
        info = next(one for one in extra if isinstance(one, ParameterInfo))
        yield name, info, kind, parameter.default


def metavar(name: str, info: ParameterInfo, kind: Any, default: object) -> str:
    """What stands for the value: typer's metavar, or the choices, or a word for the type."""
    if info.metavar:
        return info.metavar
    if isinstance(info, ArgumentInfo):
        return name.upper()
    choices = [choice for part in typing.get_args(kind) or (kind,) for choice in literal(part)] or literal(kind)
    if choices:
        return "|".join(choices)
    types_of = {part for part in typing.get_args(kind) if part is not types.NoneType} or {kind}
    words = {int: "N", float: "X", str: "TEXT", Path: "FILE", bool: ""}
    return next(word for known, word in words.items() if known in types_of)


def literal(kind: Any) -> list[str]:
    return [str(choice) for choice in typing.get_args(kind)] if typing.get_origin(kind) is Literal else []


def usage_of(name: str, info: ParameterInfo, kind: Any, default: object) -> str:
    shown = metavar(name, info, kind, default) + ("..." if typing.get_origin(kind) is list else "")
    return shown if default is inspect.Parameter.empty else f"[{shown}]"


def spelled(name: str, info: ParameterInfo, kind: Any, default: object) -> str:
    """`--output DIR`, `-o`: the names of an option, with what stands for its value behind the first."""
    assert isinstance(info, OptionInfo)
    given = info.default if isinstance(info.default, str) else ""  # typer takes Option's first argument for a default
    names = [one for declared in (given, *(info.param_decls or ())) for one in declared.split("/") if one]
    if not any(one.startswith("--") for one in names):
        names.append("--" + name.replace("_", "-"))
        names += ["--no-" + name.replace("_", "-")] if kind is bool else []
    names.sort(key=lambda one: not one.startswith("--"))
    names[0] = f"{names[0]} {metavar(name, info, kind, default)}".rstrip()
    return ", ".join(f"`{one}`" for one in names).replace("|", "\\|")


def sentence(name: str, info: ParameterInfo, kind: Any, default: object) -> str:
    """The help text, with the bounds and the default behind it."""
    nothing = default is None or isinstance(default, bool) or default is inspect.Parameter.empty
    shown = info.show_default is not False and not nothing
    bounds = [f"at least {info.min:g}"] if info.min is not None else []
    bounds += [f"at most {info.max:g}"] if info.max is not None else []
    bounds += [f"default `{default}`"] if shown else ["default"] if default is True else []
    bounds += ["required"] if default is inspect.Parameter.empty and isinstance(info, OptionInfo) else []
    return cell(info.help or "") + (f" *({', '.join(bounds)})*" if bounds else "")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def paragraphs(text: str) -> str:
    """A docstring as Markdown: blocks marked by click's \\b keep their lines."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        if block.startswith("\b"):
            parts.append(f"```text\n{block.removeprefix(chr(8)).strip(chr(10))}\n```")
        else:
            parts.append(" ".join(block.split()))
    return "\n\n".join(parts)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
