"""Where this user's machine keeps what can be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from edgephi.errors import OutputError
from edgephi.files import said


def cache_folder() -> Path:
    """The folder EDGEPHI_CACHE names, or edgephi's part of the user's cache folder; it need not exist."""
    import platformdirs

    named = os.environ.get("EDGEPHI_CACHE")
    if named:
        return Path(named)
    return own_folder(platformdirs.user_cache_path("edgephi", appauthor=False), "EDGEPHI_CACHE")


def require_writable(folder: Path) -> None:
    """Make the cache folder, and try it.

    Raises:
        OutputError: nothing can be written there; EDGEPHI_CACHE can name another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise unusable(problem, folder) from problem


def unusable(problem: OSError, folder: Path) -> OutputError:
    """The error for what the system said about the cache folder."""
    return OutputError(
        f"the cache folder cannot be used: {said(problem)}",
        where=folder,
        remedy="Check its permissions and the disk's space, or name another folder in EDGEPHI_CACHE",
    )


def own_folder(found: Path, variable: str) -> Path:
    """The user's folder that the system names; a user without a home has none, and would get one called `~`.

    Raises:
        OutputError: there is none; the variable can name one.
    """
    if not found.is_absolute():
        raise OutputError("this user has no home folder", remedy=f"Name a folder in {variable}")
    return found
