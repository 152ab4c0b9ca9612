"""Types of command-line arguments that name files, folders and programs: argparse checks them before any work begins.

Each takes what was typed and returns a path; what is not there is a sentence and exit status 2.
"""

from __future__ import annotations

import os
import shutil
from argparse import ArgumentTypeError
from pathlib import Path

from edgephi.bundle import MANIFEST


def file(text: str) -> Path:
    """A file that is there."""
    path = Path(text)
    if not _is(path.is_file):
        raise ArgumentTypeError(f"there is no file {text}")
    return path


def folder(text: str) -> Path:
    """A folder that is there."""
    path = Path(text)
    if not _is(path.is_dir):
        raise ArgumentTypeError(f"there is no folder {text}")
    return path


def bundle(text: str) -> Path:
    """A folder that `edgephi export` wrote."""
    path = folder(text)
    if not _is((path / MANIFEST).is_file):
        raise ArgumentTypeError(f"{text} is no bundle: it has no {MANIFEST}")
    return path


def new_file(text: str) -> Path:
    """A file that can be written: its folder is there, and it is no folder itself."""
    path = Path(text)
    if _is(path.is_dir):
        raise ArgumentTypeError(f"{text} is a folder; name a file")
    folder(str(path.parent))
    return path


def new_folder(text: str) -> Path:
    """A folder that is there or can be made: no part of its path is a file."""
    path = Path(text)
    existing = next((part for part in (path, *path.parents) if _is(part.exists)), None)
    if existing is None or not existing.is_dir():
        raise ArgumentTypeError(f"{existing or text} is no folder")
    return path


def interpreter(text: str) -> Path:
    """A program, by path or by name; links stay links, as a virtual environment's interpreter is one out of it."""
    found = shutil.which(text)
    if found is None:
        raise ArgumentTypeError(f"there is no program {text}")
    return Path(os.path.abspath(found))  # noqa: PTH100


def source(text: str) -> str:
    """What `edgephi export` takes; what can only be a path is looked for, and a hub id is not."""
    local = text.startswith((".", "/", "~")) or "\\" in text or text.count("/") != 1 or Path(text).suffix == ".gguf"
    if local and not text.startswith("ollama:") and "://" not in text and not _is(Path(text).exists):
        raise ArgumentTypeError(f"there is no file or folder {text}")
    return text


def _is(look: object) -> bool:
    try:
        return bool(look())  # type: ignore[operator]
    except (OSError, ValueError):  # a name too long, a NUL character
        return False
