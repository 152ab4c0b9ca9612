"""Options several verbs of edgephi hub share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder of the run: its state, fleet.json, profiles.", show_default=False),
]
Poll = Annotated[float, typer.Option(min=0.01, metavar="SECONDS", help="Pause between looks at running jobs.")]
DEFAULT_POLL_S = 15.0
