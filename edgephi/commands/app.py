"""The `edgephi` command: verbs, and the one place where errors become a sentence and an exit status."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn, TextIO

import typer

import edgephi
from edgephi.commands import (
    adapter,
    ai_hub,
    bench,
    cache,
    chat,
    completion,
    demo,
    devices,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    list_models,
    package,
    pull,
    remove,
    run,
    serve,
    verify,
)
from edgephi.commands.process import INTERRUPTED, TERMINATED, ReaderGone, Terminated, as_exceptions, guard_streams
from edgephi.errors import EdgephiError, UsageError, printable, printable_lines
from edgephi.files import system_error

app = typer.Typer(
    name="edgephi",
    help="Small language models on real machines: export, quantize, run, and prove what ran where.",
    no_args_is_help=True,
    add_completion=False,  # `edgephi completion` prints the scripts; nothing is written into a shell's files
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("run")(run.run)
app.command("pull")(pull.pull)
app.command("list")(list_models.list_models)
app.command("rm")(remove.remove)
app.command("cache")(cache.cache)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("evaluate")(evaluate.evaluate)
app.command("package")(package.package)
app.command("devices")(devices.devices)
app.command("doctor")(doctor.doctor)
app.command("completion")(completion.completion)
app.add_typer(adapter.app, name="adapter")
app.add_typer(bench.app, name="bench")
app.add_typer(ai_hub.app, name="ai-hub")
app.add_typer(ai_hub.app, name="hub", hidden=True)  # its earlier name


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgephi {edgephi.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Small language models on real machines: export, quantize, run, and prove what ran where."""


def main() -> None:
    """Run the command. Exit status: 0 done, 1 error, 2 usage, 130 interrupted, 143 terminated."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with as_exceptions():
            guard_streams()
            completion.prepare()
            status = app(args=arguments, prog_name="edgephi", standalone_mode=False)
            sys.stdout.flush()
    except (KeyboardInterrupt, Terminated) as ended:
        interrupted = isinstance(ended, KeyboardInterrupt)
        _fail("interrupted" if interrupted else "terminated", INTERRUPTED if interrupted else TERMINATED)
    except ReaderGone:
        sys.exit(1)
    except Exception as error:
        shown = getattr(error, "show", None)
        if shown is not None:  # Typer's, of which there are two families: its own click, and click itself
            _usage(shown, int(getattr(error, "exit_code", 2)))
        if debug:
            raise
        _fail(*_sentence(error))
    sys.exit(status if isinstance(status, int) else 0)


def _sentence(error: Exception) -> tuple[str, int]:
    """What happened and what to do next, and the exit status."""
    if isinstance(error, EdgephiError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError):
        if not _has_current_folder():
            return "the current folder no longer exists. Change to another one (cd) and run the command again.", 1
        return str(system_error(error, EdgephiError)), 1
    if isinstance(error, MemoryError):
        return "there is not enough memory. Close other programs, or take a smaller model.", 1
    reason = printable((str(error).splitlines() or [""])[0])
    return f"unexpected {type(error).__name__}: {reason}. Run again with --debug and report what it shows.", 1


def _has_current_folder() -> bool:
    try:
        os.getcwd()  # noqa: PTH109
    except OSError:
        return False
    return True


def _usage(show: Callable[[TextIO], None], status: int) -> NoReturn:
    """What Typer says about the arguments; they may hold anything."""
    said = io.StringIO()
    show(said)
    print(printable_lines(said.getvalue()), end="", file=sys.stderr)
    sys.exit(status)


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
