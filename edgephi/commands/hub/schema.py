"""edgephi hub schema: the form of a fleet report."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON Schema of fleet.json."""
    from edgephi.commands.console import print_json
    from edgephi.devices.ai_hub.report import FleetReport

    print_json(FleetReport.model_json_schema(), indent=2)
