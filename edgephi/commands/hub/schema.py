"""edgephi hub schema: the form of a fleet report."""

from __future__ import annotations

import json

import typer


def schema() -> None:
    """Print the JSON Schema of fleet.json."""
    from edgephi.devices.hub.report import FleetReport

    typer.echo(json.dumps(FleetReport.model_json_schema(), indent=2, ensure_ascii=False))
