"""The messages typed before, in a file that only this user may read."""

from __future__ import annotations

import os
from pathlib import Path

from edgephi.devices.cache import own_folder
from edgephi.errors import OutputError
from edgephi.files import said

NAME = "chat_history"
LARGEST = 2**20
"""Bytes; of a larger file the newer half is kept."""


def history_file() -> Path:
    """Of `edgephi chat`: in the folder EDGEPHI_STATE names, or in edgephi's part of the user's state folder.

    Raises:
        OutputError: this user has no home folder.
    """
    import platformdirs

    if named := os.environ.get("EDGEPHI_STATE"):
        return Path(named) / NAME
    return own_folder(platformdirs.user_state_path("edgephi", appauthor=False), "EDGEPHI_STATE") / NAME


def prepare_history(path: Path) -> Path:
    """Make the file, for this user alone, and keep it from growing without end.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)  # on Windows the user's folders are the user's alone
        if path.stat().st_size > LARGEST:
            # prompt_toolkit's format: entries begin with an empty line
            newer = path.read_bytes()[-LARGEST // 2 :]
            path.write_bytes(newer[max(0, newer.find(b"\n\n")) :])
    except OSError as problem:
        raise OutputError(
            f"the history of messages cannot be kept: {said(problem)}",
            where=path,
            remedy="Pass --no-history, or name another folder in EDGEPHI_STATE",
        ) from problem
    return path
