"""PyInstaller's way to edgephi: the entry point `pyinstaller40` of pyproject.toml names `hook_dirs`."""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """The folder of `hook-edgephi.py` and of the runtime hooks that `rthooks.dat` lists."""
    return [str(Path(__file__).parent)]
