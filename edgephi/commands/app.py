"""The `edgephi` command: verbs, and the one place where errors become a sentence and an exit status."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import edgephi
from edgephi.commands import bench, chat, demo, devices, doctor, evaluate, export, generate, hub, inspect, verify
from edgephi.errors import EdgephiError, UsageError

app = typer.Typer(
    name="edgephi",
    help="Small language models on real machines: export, quantize, run, and prove what ran where.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("evaluate")(evaluate.evaluate)
app.command("devices")(devices.devices)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")
app.add_typer(hub.app, name="hub")


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
    """Run the command. Exit status: 0 done, 1 error, 2 usage, 130 interrupted."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    _use_any_console()
    try:
        app(args=arguments, prog_name="edgephi")
    except EdgephiError as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        reason = (str(error).splitlines() or [""])[0]
        _fail(f"unexpected {type(error).__name__}: {reason}. Run again with --debug and report what it shows.", 1)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _use_any_console() -> None:
    """A console or pipe with a legacy code page shows `?` for what it lacks; it must not end the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
