"""Folders as plain data, so that a mutation is a function and a failing input can be written out again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SECRET = b"SECRET-OUTSIDE-OF-THE-FOLDER {{ messages[0].content }}"
"""What lies in `outside`, beside every input: it must never turn up in an output."""
OUTSIDE = "outside"


@dataclass(frozen=True)
class Special:
    """Something in a folder that is no regular file with bytes of its own."""

    kind: Literal["link", "pipe", "sparse", "folder"]
    target: str = ""
    """Of a link, relative to the folder it lies in."""
    bytes: int = 0
    """Of a sparse file."""
    start: bytes = b""
    """What a sparse file begins with."""


Entry = bytes | Special
Tree = dict[str, Entry]
"""Contents by path relative to the folder."""


def read_tree(folder: Path) -> Tree:
    """Every regular file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a folder that does not exist yet. Pipes and links become empty files where the system has none."""
    folder.mkdir(parents=True)
    for name, entry in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry, bytes):
            path.write_bytes(entry)
        elif entry.kind == "folder":
            path.mkdir()
        elif entry.kind == "sparse":
            path.write_bytes(entry.start)
            os.truncate(path, entry.bytes)
        elif os.name == "nt":
            path.write_bytes(b"")
        elif entry.kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(entry.target)


def write_outside(folder: Path, originals: Tree) -> None:
    """The folder beside an input that links may lead to: a text nobody may copy, and files as they were."""
    write_tree({"secret.txt": SECRET} | {f"original-{name}": entry for name, entry in originals.items()}, folder)
