"""edgephi hub devices: what can be measured on."""

from __future__ import annotations

import json

import typer

from edgephi.commands.options import Json


def devices(as_json: Json = False) -> None:
    """List the hosted devices.

    With --json, one object: server (its address) and devices, a list of name, os, chipset (or null) and attributes,
    which are the hub's own words for the runtimes, the chip and the vendor.
    """
    from dataclasses import asdict

    from edgephi.devices.hub.client import HubClient

    client = HubClient()
    found = client.devices()
    if as_json:
        facts = {"server": client.server, "devices": [asdict(device) for device in found]}
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    from rich.table import Table
    from rich.text import Text

    from edgephi.commands.console import harmless, stdout

    table = Table(box=None, pad_edge=False)
    for heading in ("device", "system", "chipset"):
        table.add_column(heading)
    for device in found:
        table.add_row(*(Text(harmless(part)) for part in (device.name, device.os, device.chipset or "")))
    stdout().print(table)
