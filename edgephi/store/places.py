"""Where the store keeps what it has: two folders of one user."""

from __future__ import annotations

import os
from pathlib import Path

from edgephi.devices.cache import own_folder
from edgephi.errors import OutputError
from edgephi.files import remedy_for, said

VARIABLE = "EDGEPHI_HOME"


def home_folder() -> Path:
    """The folder EDGEPHI_HOME names, or edgephi's part of the user's data folder; it need not exist.

    Raises:
        OutputError: the user has no home folder.
    """
    import platformdirs

    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return own_folder(platformdirs.user_data_path("edgephi", appauthor=False), VARIABLE)


def models_folder() -> Path:
    """One folder a model, by its name: a bundle. An export's staging folder lies beside it and begins with a dot."""
    return home_folder() / "models"


def state_folder() -> Path:
    """What is known of a model beside its bundle, one small file for each fact: see `library` and `progress_file`."""
    return home_folder() / "state"


def make_folders() -> None:
    """Make both.

    Raises:
        OutputError: they cannot be made; EDGEPHI_HOME can name another place.
    """
    for folder in (models_folder(), state_folder()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise unusable(problem, folder) from problem


def unusable(problem: OSError, where: Path) -> OutputError:
    """The error for what the system said about a folder of the store."""
    general = remedy_for(problem)
    return OutputError(
        f"the store of models cannot be used: {said(problem)}",
        where=where,
        remedy=f"{general + '. Or name' if general else 'Check its permissions, or name'} another folder in {VARIABLE}",
    )
