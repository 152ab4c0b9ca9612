"""Which bundles passed the examination of their small files before, so that later loads need not repeat it.

A load hashes every small file and compares it with the manifest; then it reads graphs and JSON files for what could
harm whoever opens them (`edgephi/contents.py`). The outcome depends on nothing but the hashed bytes, the manifest and
the rules. So a mark in the user's cache, named after a hash of the manifest and of the rules' own source, stands for an
examination that was passed. The hashes are compared at every load, mark or not, and a file too large for that is
examined at every load. Whoever may write into this cache can also replace the prepacked graphs that onnxruntime runs
from there, so a mark gives him nothing new; one that belongs to another user is not used.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from contextlib import suppress
from pathlib import Path

import edgephi.contents
from edgephi.bundle import Manifest, check_bundle
from edgephi.devices.cache import cache_folder
from edgephi.errors import OutputError

RULES = ("contents.py", "genai_config.py", "graph_file.py", "files.py", "records.py")
"""Files of `edgephi/` that say what is refused."""
MARK = re.compile(r"[0-9a-f]{64}")
"""What marks are called; nothing else is ever removed."""
KEPT = 64
"""Marks; those used longest ago go first."""


def examine(folder: Path, manifest: Manifest, *, every_byte: bool) -> None:
    """`check_bundle`, without reading again what passed before; with `every_byte` nothing is taken as known.

    Raises:
        BundleError: naming the first file that differs or is refused.
    """
    known = not every_byte and was_examined(manifest)
    check_bundle(folder, manifest, every_byte=every_byte, examined=known)
    if not known:
        remember(manifest)


def was_examined(manifest: Manifest) -> bool:
    """Whether a bundle with this manifest passed under the present rules on this machine; it counts as used now."""
    try:
        mark = _mark(manifest)
        found = mark.lstat()
        if not stat.S_ISREG(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
            return False
        with suppress(OSError):
            os.utime(mark)
    except (OSError, OutputError):  # no mark, no home, or a cache that is closed to this user
        return False
    return True


def remember(manifest: Manifest) -> None:
    """Write the mark of a bundle that passed; where the cache cannot be written, the next load examines it again."""
    with suppress(OSError, OutputError):
        mark = _mark(manifest)
        mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark.touch(mode=0o600)
        marks = [path for path in mark.parent.iterdir() if MARK.fullmatch(path.name)]
        marks.sort(key=lambda path: path.lstat().st_mtime_ns, reverse=True)
        for old in marks[KEPT:]:
            old.unlink(missing_ok=True)


def _mark(manifest: Manifest) -> Path:
    digest = hashlib.sha256(manifest.model_dump_json().encode())
    folder = Path(edgephi.contents.__file__).parent
    for name in RULES:
        digest.update(_identity(folder / name))
    return cache_folder() / "examined" / digest.hexdigest()


def _identity(rules: Path) -> bytes:
    """A file's SHA-256. A frozen program has no such files; there the program is what holds the rules."""
    try:
        return hashlib.sha256(rules.read_bytes()).digest()
    except OSError:
        program = Path(sys.executable).stat()
        return f"{program.st_size} {program.st_mtime_ns}".encode()
