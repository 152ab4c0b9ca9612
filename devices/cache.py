"""Where this user's machine keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder EDGEPHI_CACHE names, or edgephi's part of the user's cache folder; it need not exist."""
    import platformdirs

    named = os.environ.get("EDGEPHI_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("edgephi", appauthor=False)
