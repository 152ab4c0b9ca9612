"""`edgephi cache`: what edgephi keeps on this machine, and removing what can be made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.terminal.options import Json

if TYPE_CHECKING:
    from edgephi.store.caches import Kept

REMOVED_BY = {"never": "", "clean": "--clean", "downloads": "--clean --downloads"}


def cache(
    clean: Annotated[
        bool, typer.Option("--clean", help="Remove what can be made again, models apart, and show what was removed.")
    ] = False,
    downloads: Annotated[
        bool, typer.Option("--downloads", help="With --clean: also the checkpoints that installed models were made of.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what lies where: models, downloads, what interrupted pulls left, prepacked and integer weights, saved
    prefixes.

    --clean removes unfinished exports and downloads, prepacked weights (a load writes them again), integer weights
    (`--prefill integers` makes them again), saved prefixes, and bundles of `edgephi demo --weights`. Models are removed
    by `edgephi rm`. Checkpoints in the hub's cache that were not pulled through the store may be another program's and
    stay.

    With --json, one object: kept (with --clean: removed), a list of kind, name, path, bytes and cleaned ("never",
    "clean" or "downloads": what removes it).
    """
    from edgephi.commands.terminal.console import format_bytes, print_json, stdout
    from edgephi.commands.terminal.tables import print_table
    from edgephi.errors import UsageError
    from edgephi.store import caches

    if downloads and not clean:
        raise UsageError("--downloads is for --clean", remedy="Add --clean")
    found = caches.clean(downloads=downloads) if clean else caches.kept()
    if as_json:
        print_json({"removed" if clean else "kept": [_record(one) for one in found]})
        return
    if found:
        header = ("Removed" if clean else "What", "Name", "Size", *(() if clean else ("Goes with",)), "Where")
        print_table(header, [_row(one, clean) for one in found], right=("Size",))
    total = format_bytes(sum(one.bytes for one in found if one.kind != "compiled for an NPU"))
    stdout().print(f"{total} {'removed' if clean else 'in all'}")


def _record(one: Kept) -> dict[str, object]:
    return vars(one) | {"path": str(one.path)}


def _row(one: Kept, clean: bool) -> tuple[str, ...]:
    from edgephi.commands.terminal.console import format_bytes

    goes = "edgephi rm" if one.kind == "model" else REMOVED_BY[one.cleaned]
    return one.kind, one.name, format_bytes(one.bytes), *(() if clean else (goes,)), str(one.path)
