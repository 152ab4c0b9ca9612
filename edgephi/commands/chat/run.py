"""`edgephi run`: from a name to a conversation, whatever is missing in between."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgephi.commands.terminal.options import (
    Device,
    MaxNewTokens,
    Seed,
    Temperature,
    TopP,
    known_names,
)


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, the name of an installed model, or anything that `edgephi pull` takes.",
            show_default=False,
            autocompletion=known_names,
        ),
    ],
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instructions the conversation starts with.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Pull a model if it is not installed, then talk with it as with `edgephi chat`."""
    from edgephi.commands.chat.chat import chat
    from edgephi.commands.store.pull import showing_readiness, summary
    from edgephi.commands.terminal.console import stderr
    from edgephi.errors import printable
    from edgephi.manifest import MANIFEST
    from edgephi.store.library import find_installed, record_use
    from edgephi.store.names import as_name
    from edgephi.store.readiness import ensure_ready

    folder = Path(model)
    if not (folder / MANIFEST).is_file():
        name = as_name(model)
        was_there = name is not None and find_installed(name) is not None
        with showing_readiness() as on_progress:
            installed = ensure_ready(model, device=device, on_progress=on_progress)
        if not was_there:
            for line in summary(installed)[:-1]:
                stderr().print(printable(line), style="dim", soft_wrap=True)
        record_use(installed.name)
        folder = installed.folder
    chat(
        folder,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
    )
