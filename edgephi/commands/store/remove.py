"""`edgephi rm`: a model leaves the store."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edgephi.commands.terminal.options import model_names
from edgephi.errors import printable


def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME", help="Names of installed models.", show_default=False, autocompletion=model_names
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete models of the store. On a terminal it asks first.

    A model that another program has loaded is refused, where the system tells. What was downloaded to make it stays in
    the hub's cache: `edgephi cache` shows it.
    """
    from edgephi.commands.terminal.console import format_bytes, stdout
    from edgephi.store.library import remove as delete

    for name in names:
        if not yes and sys.stdin.isatty() and not typer.confirm(f"Delete {printable(name)}?"):
            continue
        freed = delete(name)
        stdout().print(printable(f"{name}: deleted, {format_bytes(freed)}"), soft_wrap=True)
