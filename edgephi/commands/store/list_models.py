"""`edgephi list`: the models that are installed."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.terminal.options import Json

if TYPE_CHECKING:
    from edgephi.store.library import InstalledModel
    from edgephi.store.names import KnownModel


def list_models(
    every: Annotated[bool, typer.Option("--all", help="Show short names that can be pulled as well.")] = False,
    as_json: Json = False,
) -> None:
    """Show the models that are installed: size, quality, device and last use.

    Quality is what `edgephi evaluate --record` wrote into the bundle. On a terminal it is a table, elsewhere Markdown.

    With --json, one object: folder (of the store), models (name, source, folder, bytes, quality: {perplexity, kl_mean,
    top1_agreement, against, text} or null, devices, last_used: time in UTC or null, notes, problem: why it cannot be
    used, or null), and with --all available (name, hub: id or null, licence, parameters, download_bytes; null where it
    is not known).
    """
    from edgephi.commands.terminal.console import print_json, stderr, stdout
    from edgephi.commands.terminal.tables import print_table
    from edgephi.store.library import installed
    from edgephi.store.names import known_models
    from edgephi.store.places import models_folder

    models = installed()
    names = {model.name for model in models}
    available = [known for known in known_models().values() if known.name not in names] if every else []
    if as_json:
        record: dict[str, object] = {"folder": str(models_folder()), "models": [as_record(model) for model in models]}
        print_json(record | ({"available": [vars(known) for known in available]} if every else {}))
        return
    if models:
        header = ("Name", "Size", "Quality", "Device", "Last used", "From")
        print_table(header, [_row(model) for model in models], right=("Size",))
    elif not every:
        stdout().print(
            "No model is installed. `edgephi list --all` shows what can be pulled; begin with `edgephi run demo`.",
            soft_wrap=True,
        )
    if available:
        if models:
            stdout().print()
        known_header = ("Can be pulled", "Parameters", "Download", "Licence", "From")
        print_table(
            known_header,
            [_available(known) for known in available],
            right=("Parameters", "Download"),
            cut=("From",),
        )
        stderr().print("Get one with `edgephi pull NAME`.", style="dim")


def as_record(model: InstalledModel) -> dict[str, object]:
    """A model as JSON has it."""
    quality = model.quality
    return {
        "name": model.name,
        "source": model.source,
        "folder": str(model.folder),
        "bytes": model.bytes,
        "quality": None
        if quality is None
        else {
            "perplexity": quality.perplexity,
            "kl_mean": quality.kl_mean,
            "top1_agreement": quality.top1_agreement,
            "against": quality.against,
            "text": quality.text.name,
        },
        "devices": list(model.devices),
        "last_used": None if model.last_used is None else model.last_used.isoformat(timespec="seconds"),
        "notes": list(model.notes),
        "problem": model.problem,
    }


def _row(model: InstalledModel) -> tuple[str, ...]:
    from edgephi.commands.terminal.console import format_bytes

    quality = "not measured"
    if model.quality is not None:
        distance = "" if model.quality.kl_mean is None else f", KL {model.quality.kl_mean:.3g}"
        quality = f"perplexity {model.quality.perplexity:.2f}{distance}"
    if model.problem is not None:
        quality = f"damaged: {model.problem}"
    used = "never" if model.last_used is None else _day(model.last_used)
    return model.name, format_bytes(model.bytes), quality, model.device, used, model.source


def _day(when: datetime) -> str:
    return when.astimezone().strftime("%Y-%m-%d %H:%M")


def _available(known: KnownModel) -> tuple[str, ...]:
    from edgephi.commands.terminal.console import format_bytes, format_count

    return (
        known.name,
        "" if known.parameters is None else format_count(known.parameters),
        "" if known.download_bytes is None else format_bytes(known.download_bytes),
        known.licence,
        known.hub or "the Python package index",
    )
