"""edgephi hub wait: the results of what was submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgephi.commands.hub.options import DEFAULT_POLL_S, Poll
from edgephi.commands.options import Json


def wait(
    state: Annotated[
        Path,
        typer.Argument(metavar="STATE", help="The state.json of a run, or its folder.", show_default=False),
    ],
    timeout_minutes: Annotated[float, typer.Option(min=0, help="Longest time to wait.")] = 240,
    poll: Poll = DEFAULT_POLL_S,
    as_json: Json = False,
) -> None:
    """Wait for the submitted jobs of a run, fetch what they measured, and merge it into fleet.json beside the state.

    With --json, one object: the report, whose schema `edgephi hub schema` prints.
    """
    from edgephi.commands.hub.driving import finish, require_server, say
    from edgephi.devices.ai_hub.client import HubClient
    from edgephi.devices.ai_hub.fleet import Fleet
    from edgephi.devices.ai_hub.state import STATE, read_state

    path = state / STATE if state.is_dir() else state
    before = read_state(path)
    client = HubClient()
    require_server(before, client, path)
    fleet = Fleet(client, path, before, {}, lambda step, what: None)
    finish(fleet, lambda: fleet.wait(timeout_s=60 * timeout_minutes, poll_s=poll, submit=False), as_json)
    left = sum(step.status in ("planned", "submitting") for step in fleet.state.steps.values())
    if left:
        say(f"{left} jobs of this run are not submitted; the command that planned them goes on with them")
