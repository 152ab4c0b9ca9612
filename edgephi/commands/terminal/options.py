"""Options several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgephi.runtime.engines import ENGINES
from edgephi.runtime.integers import PrefillChoice

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[tuple(entry.name for entry in ENGINES)]


def bundle_folder(text: str) -> Path:
    """What a person named: a folder, or a model of the store."""
    from edgephi.store.library import find

    return find(text)


def model_names(incomplete: str) -> list[str]:
    """Names of installed models, for the completion of shells; folders are the shell's own business."""
    from edgephi.errors import EdgephiError
    from edgephi.store.library import installed_names

    try:
        return [name for name in installed_names() if name.startswith(incomplete.lower())]
    except EdgephiError:
        return []


def known_names(incomplete: str) -> list[str]:
    """As `model_names`, with the short names that can be pulled."""
    from edgephi.store.names import known_models

    every = dict.fromkeys([*model_names(incomplete), *known_models()])
    return [name for name in every if name.startswith(incomplete.lower())]


Bundle = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A folder `edgephi export` wrote, or the name of an installed model (`edgephi list`).",
        show_default=False,
        parser=bundle_folder,
        autocompletion=model_names,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, metavar="N", help="Upper bound of an answer; the context bounds it as well.")
]
Temperature = Annotated[
    float, typer.Option(min=0.0, metavar="X", help="0 takes the most likely token; more is more varied.")
]
TopP = Annotated[
    float, typer.Option(metavar="X", help="Nucleus sampling: keep the likeliest tokens up to this probability.")
]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="Makes sampling repeatable.", show_default=False)]
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
Engine = Annotated[
    EngineName | None,
    typer.Option(
        "--engine",
        help=f"What computes. {' '.join(f'{entry.name}: {entry.about}.' for entry in ENGINES)} Left out, the first of "
        "these that runs the bundle on the device.",
        show_default=False,
    ),
]
Speculation = Annotated[
    bool | None,
    typer.Option(
        "--speculation/--no-speculation",
        help="Guess tokens from the text so far and verify several in one run, where the engine can. Left out, where a "
        "measurement on this machine shows that it changes no answer.",
        show_default=False,
    ),
]
Prefill = Annotated[
    PrefillChoice | None,
    typer.Option(
        "--prefill",
        help="What computes prompts on the CPU: the bundle's blocks, or integers, which are made on this machine and "
        "measured when they are first asked for. auto: integers where they were made and memory is free. Left out, as "
        "EDGEPHI_PREFILL says, or auto.",
        show_default=False,
    ),
]
AdapterFile = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FILE",
        help="Answer with this LoRA adapter, which `edgephi adapter convert` wrote.",
        show_default=False,
    ),
]
