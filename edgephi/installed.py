"""Commands that work here, for messages: how edgephi was installed, and how this system's shell quotes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from edgephi.errors import printable


def checkout() -> Path | None:
    """The folder of the clone that edgephi's code is read from; None: it was copied to where packages are."""
    root = Path(__file__).parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "devices").is_dir() else None


def install_extra(extra: str | None) -> str:
    """The command that installs edgephi with an extra, from where it came.

    Args:
        extra: as `qnn`; None: edgephi alone.
    """
    name = f"[{extra}]" if extra else ""
    if (root := checkout()) is not None:
        return f'pip install -e "{root}{name}"'
    origin = _origin()
    url = origin.get("url")
    if not isinstance(url, str):
        return f'pip install "edgephi{name}"'  # by its name, so an index has it
    vcs = origin.get("vcs_info")
    if isinstance(vcs, dict):
        return f'pip install "edgephi{name} @ {vcs.get("vcs", "git")}+{url}@{vcs.get("commit_id", "HEAD")}"'
    if "dir_info" in origin:
        from urllib.request import url2pathname  # brings HTTP and TLS with it

        folder = Path(url2pathname(urlsplit(url).path))
        # without the folder it was installed from there is nothing better to name than any clone
        return f'pip install "{folder}{name}"' if folder.is_dir() else f'pip install ".{name}", in a clone of edgephi'
    return f'pip install "edgephi{name} @ {url}"'


def copyable(*words: object) -> str:
    """A command that does what it says when it is copied into this system's shell."""
    texts = [printable(str(word)) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def _origin() -> dict[str, object]:
    """What pip wrote down about where edgephi came from (PEP 610); empty: an index."""
    try:
        found = json.loads(metadata.distribution("edgephi").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
