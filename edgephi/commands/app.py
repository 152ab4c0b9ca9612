"""The `edgephi` command: verbs, and the one place where errors become a sentence and an exit status."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

import edgephi
from edgephi.commands import completion, demo, devices, doctor, serve
from edgephi.commands.bundles import adapter, export, inspect, package, verify
from edgephi.commands.chat import chat, generate, run
from edgephi.commands.measure import ai_hub, bench, evaluate
from edgephi.commands.store import cache, list_models, pull, remove
from edgephi.commands.terminal.process import (
    INTERRUPTED,
    TERMINATED,
    ReaderGone,
    Terminated,
    as_exceptions,
    guard_streams,
)
from edgephi.errors import EdgephiError, NoGraphError, UsageError, printable, printable_lines
from edgephi.files import system_error

GET, USE, MAKE, MEASURE, SHIP, MACHINE = (
    "Get a model",
    "Use it",
    "Make one of your own",
    "Look at it, measure it",
    "Ship it",
    "This machine",
)


class Verbs(TyperGroup):
    """The verbs under headings, in the order in which a newcomer needs them; each in one line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        shown = [(name, verb) for name, verb in self.commands.items() if not verb.hidden]
        width = max(len(name) for name, _ in shown)
        for heading in (GET, USE, MAKE, MEASURE, SHIP, MACHINE):
            with formatter.section(heading):
                formatter.write_dl(
                    [
                        (f"{name:<{width}}", verb.get_short_help_str(formatter.width))
                        for name, verb in shown
                        if getattr(verb, "rich_help_panel", None) == heading
                    ]
                )


app = typer.Typer(
    name="edgephi",
    cls=Verbs,
    help="Small language models on real machines: export, quantize, run, and prove what ran where.",
    epilog="Begin with `edgephi run demo`. `edgephi VERB --help` says more about a verb.",
    no_args_is_help=True,
    add_completion=False,  # `edgephi completion` prints the scripts; nothing is written into a shell's files
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _add(name: str, verb: Callable[..., None], heading: str, about: str) -> None:
    app.command(name, short_help=about, rich_help_panel=heading)(verb)


def _add_group(name: str, group: typer.Typer, heading: str, about: str) -> None:
    app.add_typer(group, name=name, short_help=about, rich_help_panel=heading)


_add("demo", demo.demo, GET, "Fetch a small model (93 MB) and ask it a question.")
_add("run", run.run, GET, "Pull a model if it is not installed, and talk with it.")
_add("pull", pull.pull, GET, "Install a model: download, export, keep under a name.")
_add("list", list_models.list_models, GET, "Show the models that are installed.")
_add("rm", remove.remove, GET, "Delete installed models.")
_add("cache", cache.cache, GET, "Show what lies where, and clean up.")
_add("generate", generate.generate, USE, "Answer one prompt.")
_add("chat", chat.chat, USE, "Talk with a model.")
_add("serve", serve.serve, USE, "Serve models over HTTP, as OpenAI's clients ask.")
_add("export", export.export, MAKE, "Export a checkpoint to a bundle, with all options.")
_add("inspect", inspect.inspect, MEASURE, "Show a bundle's model, recipe, source and files.")
_add("verify", verify.verify, MEASURE, "Compare a bundle with its manifest, byte by byte.")
_add("evaluate", evaluate.evaluate, MEASURE, "Measure quality, and the distance to the float model.")
_add("package", package.package, SHIP, "Write a folder that an app's installer takes.")
_add("devices", devices.devices, MACHINE, "Show what devices there are, and which profile fits.")
_add("doctor", doctor.doctor, MACHINE, "Look for what keeps models from running.")
_add("completion", completion.completion, MACHINE, "Print a script for a shell's Tab key.")
_add_group("adapter", adapter.app, MAKE, "Convert LoRA adapters, and look at them.")
_add_group("bench", bench.app, MEASURE, "Measure speed and memory, and compare reports.")
_add_group("ai-hub", ai_hub.app, MEASURE, "Measure NPU graphs on Qualcomm's hosted devices.")
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
    if isinstance(error, NoGraphError):
        from edgephi.store.pull_again import name_pull

        return str(name_pull(error)), 1
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
