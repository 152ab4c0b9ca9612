"""Options several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Bundle = Annotated[Path, typer.Argument(metavar="DIR", help="A folder `edgephi export` wrote.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Upper bound of an answer; the context bounds it as well.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token; more is more varied.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling: keep the likeliest tokens up to this probability.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="Float model: checkpoint folder, .gguf file, hub id, or a bundle.", show_default=False
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto, cpu, gpu, npu, or a device profile: a name `edgephi devices` lists, or a .toml file.",
    ),
]
Fallback = Annotated[
    bool, typer.Option("--fallback", help="Where the device cannot run the bundle, take the next one and say so.")
]
