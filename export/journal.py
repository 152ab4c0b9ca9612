"""The journal that lets an interrupted export continue.

What the journal says is compared with what is there: it keeps a hash of everything it vouches for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

from edgephi.bundle import sha256_of
from edgephi.errors import OutputError
from edgephi.files import is_link, remedy_for, replace_file

JOURNAL = "export.journal"
JOURNAL_LIMIT = 64 * 2**20
_FIRST_WORDS = "edgephi export "
_SHA256 = re.compile(r"[0-9a-f]{64}")

Piece = tuple[int, int, str]
"""Offset and length of bytes of the data file, and their SHA-256."""
Vouched = Sequence[Piece] | Mapping[str, str]
"""What a group consists of: pieces of the data file, or files of the staged folder by name, with their SHA-256."""


def write_refusal(error: OSError, where: Path) -> OutputError:
    """The disk is full, or the folder went away."""
    return OutputError(
        f"the output could not be written: {error.strerror or error}",
        where=where,
        remedy=remedy_for(error) or "Free disk space or choose another --output, then run the same command again",
    )


def boot_identity() -> str:
    """Changes when the machine restarts: what was written before may then not have reached the disk."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    if boot_id.is_file():
        return boot_id.read_text(encoding="ascii").strip()
    import psutil

    return f"{psutil.boot_time():.0f}"


class Journal:
    """Which groups of weights (a layer, the embedding, the head) are in the data file, whole, and which files are.

    The first line says whose it is and has a key of everything that decides the bytes (arguments, source files, layout)
    and of the machine's current start. Each other line has hashes of the group's bytes, as JSON, and after them the
    group's name. A journal with another key or malformed lines, or none, means starting anew. Written bytes survive the
    death of the process, not that of the machine; to survive that too they would have to be forced to the disk after
    every layer, which cost more than the export itself (SmolLM2 on a busy disk: 12 s instead of 4).
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._lock = Lock()
        first = _first_line(key)
        groups = _read_journal(path, first)
        self.continues = groups is not None
        self.done: dict[str, Vouched] = groups or {}
        """By group. That bytes are as they were then is for the caller to find out: `DataFile.holds`, `holds_files`."""
        lines = [first, *(_line(group, vouched) for group, vouched in self.done.items())]
        # anew in any case: the last line may have been cut off by the interruption
        text = "".join(f"{line}\n" for line in lines)
        replace_file(path, text.encode(), "Free disk space or choose another --output")

    @staticmethod
    def stands_at(path: Path, *, empty: bool) -> bool:
        """Whether an export's journal is there, damaged or not; with `empty` also one to which nothing was written."""
        if is_link(path) or not path.is_file():
            return False
        with path.open("rb") as stream:
            start = stream.read(2 * len(_FIRST_WORDS))
        return _FIRST_WORDS.encode() in start or (empty and not start)

    @staticmethod
    def names_left(path: Path, key: str) -> frozenset[str] | None:
        """Files that the journal of an interrupted export vouches for; None: this key cannot go on from it."""
        groups = _read_journal(path, _first_line(key))
        if groups is None:
            return None
        return frozenset(name for vouched in groups.values() if isinstance(vouched, Mapping) for name in vouched)

    def add(self, group: str, vouched: Vouched = ()) -> None:
        """Record a group, after its last byte was written."""
        try:
            with self._lock, self._path.open("a", encoding="utf-8", newline="\n") as stream:
                stream.write(f"{_line(group, vouched)}\n")
        except OSError as error:
            raise write_refusal(error, self._path) from error

    def add_files(self, group: str, folder: Path, *names: str) -> None:
        """Record a group that consists of whole files, after their last byte was written."""
        try:
            self.add(group, {name: sha256_of(folder / name) for name in names})
        except OSError as error:
            raise write_refusal(error, folder) from error

    def holds_files(self, group: str, folder: Path, *names: str) -> bool:
        """Whether a group is recorded that consists of these files, and they have the bytes they had then."""
        vouched = self.done.get(group)
        if not isinstance(vouched, Mapping) or set(vouched) != set(names):
            return False
        with suppress(OSError):
            return all(
                not is_link(folder / name) and (folder / name).is_file() and sha256_of(folder / name) == sha256
                for name, sha256 in vouched.items()
            )
        return False


def _first_line(key: str) -> str:
    return f"{_FIRST_WORDS}{key} {boot_identity()}"


def _line(group: str, vouched: Vouched) -> str:
    return f"{json.dumps(vouched)} {group}"


def _read_journal(path: Path, first: str) -> dict[str, Vouched] | None:
    """Groups, of which the last record counts; None: no journal that begins so, or a malformed one."""
    try:
        if is_link(path) or path.stat().st_size > JOURNAL_LIMIT:
            return None
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if lines[0] != first or len(lines) < 2:
        return None
    groups: dict[str, Vouched] = {}
    for line in lines[1:-1]:  # what stands behind the last line break was cut off by the interruption
        try:
            vouched, end = json.JSONDecoder().raw_decode(line)
        except (ValueError, RecursionError):
            return None
        if not _is_vouched(vouched) or line[end : end + 1] != " ":
            return None
        groups[line[end + 1 :]] = vouched
    return groups


def _is_vouched(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(sha256, str) and _SHA256.fullmatch(sha256) for sha256 in value.values())
    return isinstance(value, list) and all(
        isinstance(piece, list) and [type(part) for part in piece] == [int, int, str] and _SHA256.fullmatch(piece[2])
        for piece in value
    )
