"""`edgephi pull`: a model gets into the store, ready to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.bundles.export import Quantize
from edgephi.commands.terminal.options import Device, known_names
from edgephi.errors import printable
from edgephi.quantize.registry import AUTO

if TYPE_CHECKING:
    from edgephi.store.library import InstalledModel
    from edgephi.store.phases import Readiness, ReadyState

GOES_ON = "interrupted; the same command goes on from what was done"


def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A short name (see `edgephi list --all`), a hub id (org/name), a .gguf file, a checkpoint folder, or "
            "ollama:NAME.",
            show_default=False,
            autocompletion=known_names,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="The model's name in the store; else its short name, or the last part of MODEL.",
        ),
    ] = None,
    device: Device = "auto",
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit, when MODEL is a hub id.")
    ] = None,
    quantize: Quantize = AUTO,
    force: Annotated[bool, typer.Option("--force", help="Export again though it is installed.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: the model, as `edgephi list`.")
    ] = False,
) -> None:
    """Install a model: download it, export it for this machine, and keep it under a short name.

    Every verb and `edgephi.load` then take the name. With --device auto the bundle has a graph for the CPU, and one for
    a GPU if onnxruntime lists one; `npu` or a profile compiles for that chip. Ctrl-C stops at any time, and the same
    command goes on from there. Models lie in the user's data folder, which EDGEPHI_HOME can name.
    """
    import time

    from edgephi.commands.store.list_models import as_record
    from edgephi.commands.terminal.console import print_json, stderr, stdout
    from edgephi.store.pulling import pull as install

    started = time.perf_counter()
    states: set[ReadyState] = set()

    def told(readiness: Readiness) -> None:
        states.add(readiness.state)
        show(readiness)

    with showing_readiness() as show:
        model = install(
            source,
            name=name,
            device=device,
            revision=revision,
            quantize=quantize,
            force=force,
            on_progress=told,
        )
    if as_json:
        print_json(as_record(model))
        return
    for line in summary(model):
        stdout().print(printable(line), soft_wrap=True)
    if not states:
        stderr().print("It was installed already; --force exports it again.", style="dim")
    else:
        stderr().print(f"ready after {time.perf_counter() - started:.1f} s", style="dim")


def summary(model: InstalledModel) -> list[str]:
    """What is installed, and how to go on."""
    from edgephi.commands.terminal.console import format_bytes

    return [
        f"{model.name}: {format_bytes(model.bytes)} for {model.device} in {model.folder}",
        *(f"note: {note}" for note in model.notes),
        f"Talk with it: edgephi chat {model.name}",
    ]


@contextmanager
def showing_readiness() -> Iterator[Callable[[Readiness], None]]:
    """One bar for all phases on stderr, on a terminal only: what is done, its bytes, and the time left of all.

    After Ctrl-C it says that nothing is lost.
    """
    from rich.progress import BarColumn, Progress, TextColumn

    from edgephi.commands.terminal.console import stderr

    console = stderr()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[facts]}"))
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            identity = bar.add_task("looking", total=None, facts="")

            def show(readiness: Readiness) -> None:
                bar.update(
                    identity,
                    description=str(readiness.state),
                    total=1.0 if readiness.total_bytes else None,
                    completed=readiness.fraction,
                    facts=facts(readiness),
                )

            yield show
    except KeyboardInterrupt:
        typer.echo(GOES_ON, err=True)
        raise


def facts(readiness: Readiness) -> str:
    """Bytes of the phase and the time left: `1.2 GB of 7.7 GB, 12 min left`."""
    from edgephi.commands.terminal.console import format_bytes

    parts = []
    if readiness.phase_total_bytes:
        parts.append(f"{format_bytes(readiness.phase_done_bytes)} of {format_bytes(readiness.phase_total_bytes)}")
    if readiness.seconds_left:
        parts.append(f"{time_left(readiness.seconds_left)} left")
    return ", ".join(parts)


def time_left(seconds: float) -> str:
    """No finer than an estimate is: `40 s`, `12 min`, `3 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds)):d} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
