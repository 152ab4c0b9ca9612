"""edgephi hub: a bundle's NPU graphs on the hosted devices of Qualcomm AI Hub. Only these verbs touch the network."""

from __future__ import annotations

import typer

from edgephi.commands.hub import devices, run, schema, submit, wait

app = typer.Typer(
    help="Measure NPU graphs on the hosted devices of Qualcomm AI Hub (extra: hub).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("devices")(devices.devices)
app.command("run")(run.run)
app.command("submit")(submit.submit)
app.command("wait")(wait.wait)
app.command("schema")(schema.schema)
