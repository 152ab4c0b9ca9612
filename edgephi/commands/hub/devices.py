"""edgephi hub devices: what can be measured on."""

from __future__ import annotations

from edgephi.commands.options import Json
from edgephi.errors import printable


def devices(as_json: Json = False) -> None:
    """List the hosted devices.

    With --json, one object: server (its address) and devices, a list of name, os, chipset (or null) and attributes,
    which are the hub's own words for the runtimes, the chip and the vendor.
    """
    from dataclasses import asdict

    from edgephi.commands.console import print_json
    from edgephi.devices.ai_hub.client import HubClient

    client = HubClient()
    found = client.devices()
    if as_json:
        facts = {"server": client.server, "devices": [asdict(device) for device in found]}
        print_json(facts)
        return
    from rich.table import Table

    from edgephi.commands.console import stdout

    table = Table(box=None, pad_edge=False)
    for heading in ("device", "system", "chipset"):
        table.add_column(heading)
    for device in found:
        table.add_row(*map(printable, (device.name, device.os, device.chipset or "")))
    stdout().print(table)
