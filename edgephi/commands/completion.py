"""`edgephi completion`: what a shell needs to complete verbs, options and names of models."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

PROTOCOL = "_EDGEPHI_COMPLETE"
"""Environment variable by which a shell's script asks the command for completions (typer's)."""


def completion(
    shell: Annotated[
        Literal["bash", "zsh", "fish", "powershell"],
        typer.Argument(metavar="SHELL", help="Whose script."),
    ],
) -> None:
    """Print a script that completes verbs, options and names of models.

    \b
    bash        eval "$(edgephi completion bash)"          in ~/.bashrc
    zsh         edgephi completion zsh > _edgephi          in a folder of $fpath
    fish        edgephi completion fish > ~/.config/fish/completions/edgephi.fish
    powershell  edgephi completion powershell | Out-String | Invoke-Expression     in $PROFILE
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # imported there

    typer.echo(get_completion_script(prog_name="edgephi", complete_var=PROTOCOL, shell=shell))


def prepare() -> None:
    """Where a shell asks for completions, let typer know its shells; called before the command's arguments are read."""
    if PROTOCOL in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]  # imported there

        completion_init()
