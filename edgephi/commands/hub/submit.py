"""edgephi hub submit: one bundle to hosted devices, without waiting."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from edgephi.commands.hub.options import Output
from edgephi.commands.options import Bundle
from edgephi.errors import printable


def submit(
    folder: Bundle,
    device: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="As `edgephi hub devices` lists it; repeatable.", show_default=False),
    ],
    output: Output,
    job: Annotated[Literal["compile", "profile"], typer.Option(help="What to do with each graph.")] = "profile",
    graph: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name or pattern of a graph; repeatable; all for an NPU when left out."),
    ] = None,
) -> None:
    """Submit a job for each NPU graph of a bundle and each device, and return; `edgephi hub wait` fetches the results.

    Prints the path of the run's state, which `wait` takes. Submitting again submits only what is missing.
    """
    from edgephi.commands.hub.driving import prepare, showing
    from edgephi.devices.ai_hub.matrix import BundleChoice, Matrix

    choice = BundleChoice(folder=str(folder.absolute()), graphs=tuple(graph or ()))
    matrix = Matrix(format=1, devices=tuple(dict.fromkeys(device)), jobs=(job,), bundle=(choice,))
    fleet = prepare(matrix, folder.absolute().parent, output, retry_failed=False)
    with showing(fleet):
        fleet.submit_ready()
    typer.echo(printable(str(fleet.path)))
