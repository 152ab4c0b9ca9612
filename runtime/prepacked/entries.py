"""Entries of the user's cache that were made of a bundle's weights: written once, and checked whenever they are used.

An entry stands for bytes that were read, not for hashes that a manifest claims. Whoever writes one hashes the weights
first; whoever finds one uses it for files that are known by place, size, times of change and number on the disk, and
hashes others once. A copy with other bytes under the same manifest is an error, and neither gives nor takes an entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import Field, ValidationError

from edgephi.bundle import HASH_AT_LOAD_UP_TO, Manifest, changed, read_unchanged, sha256_of
from edgephi.devices.cpu_features import cpu_features, cpu_name
from edgephi.devices.providers import runtime_wheels
from edgephi.errors import BundleError, EngineError
from edgephi.files import is_link, unreadable
from edgephi.records import Sha256, Strict

RECORD = "entry.json"
RECORD_LIMIT = 2**16
KEPT = 4
"""Bundles; those used longest ago go first."""
KNOWN_COPIES = 8
"""Of a bundle, whose weights need not be hashed again."""
ABANDONED_S = 3600
DISK_FACTOR, DISK_RESERVE = 3, 2**30
"""An entry takes 2.0 to 2.7 times the bundle's data; a cache must not fill the disk."""
RUNTIMES = (*runtime_wheels(), "onnxruntime-gpu")
"""Distributions that bring onnxruntime; importing it to ask for its version takes longer than a load saves."""


class _File(Strict):
    bytes: int = Field(ge=0)
    sha256: Sha256
    mtime_ns: int
    ctime_ns: int


class _Known(Strict):
    """A file whose bytes were hashed and found to be those of the manifest."""

    path: str
    bytes: int = Field(ge=0)
    mtime_ns: int
    ctime_ns: int
    number: int = Field(description="of the file on its disk (st_ino)")


class _Record(Strict):
    """entry.json."""

    entry: str = Field("", description="its folder's name: one that lies in another's place is not used")
    bundle: str = Field(description="where it was")
    files: dict[str, _File]
    copies: tuple[tuple[_Known, ...], ...] = Field(description="the weights of bundles this was made of, or equals")

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 by file name."""
        return {name: file.sha256 for name, file in self.files.items()}


def is_usable(folder: Path, manifest: Manifest, entry: Path, *, every_byte: bool, files: frozenset[str]) -> bool:
    """Whether an entry is what was written, and was made of this bundle.

    Args:
        files: that were written into it.

    Raises:
        BundleError: the bundle's weights are not those of its manifest, or cannot be read.
    """
    if not _is_sound(entry, every_byte, files):
        return False
    try:
        _require_same(folder, manifest, entry, every_byte)
    except OSError as error:
        raise unreadable(error, folder, BundleError, "Check the bundle with `edgephi verify`") from error
    return True


def entry_key(manifest: Manifest, graph: str, **more: object) -> str:
    """Of everything that decides the bytes, and what they mean to the machine that reads them."""
    facts = {
        "made": 3,  # earlier entries did not say whose place they are for
        "files": sorted((file.path, file.bytes, file.sha256) for file in manifest.files),
        "graph": graph,
        "system": (sys.platform, platform.machine()),
        "processor": (cpu_name(), sorted(cpu_features())),
        "versions": [_version(name) for name in (*RUNTIMES, "onnxruntime-genai", "onnxruntime-genai-directml")],
        **more,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _is_sound(entry: Path, every_byte: bool, files: frozenset[str]) -> bool:
    try:
        record = _read_record(entry)
        if record.files.keys() != files or record.entry != entry.name:
            return False
        touched = False
        for name, expected in record.files.items():
            path, found = entry / name, (entry / name).lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != expected.bytes:
                return False
            moved = (found.st_mtime_ns, found.st_ctime_ns) != (expected.mtime_ns, expected.ctime_ns)
            touched |= moved
            if (every_byte or moved or found.st_size <= HASH_AT_LOAD_UP_TO) and sha256_of(path) != expected.sha256:
                return False
    except (OSError, ValidationError):
        return False
    with suppress(OSError):  # a cache that is not to be written, in an image for example, is read all the same
        if touched:  # restored from a backup, say; it need not be hashed again the next time
            _write_record(entry, entry.name, record.bundle, record.hashes, record.copies)
        os.utime(entry / RECORD)  # when it was used last
    return True


def _read_record(entry: Path) -> _Record:
    """Raises OSError or ValidationError: there is no record."""
    return _Record.model_validate_json(read_small(entry / RECORD, RECORD_LIMIT))


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a file that was written beside an entry's weights.

    Raises:
        OSError: it is missing, no regular file, or larger.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
        raise OSError(f"{path} is not a regular file of at most {limit:,} bytes")
    return path.read_bytes()


def recorded_hashes(entry: Path) -> Mapping[str, str]:
    """SHA-256 of an entry's files, by name.

    Raises:
        EngineError: the entry was removed or damaged since it was found.
    """
    try:
        return _read_record(entry).hashes
    except (OSError, ValidationError) as error:
        raise EngineError(
            "the cache's weights were removed or changed while they were loaded",
            where=entry,
            remedy="Load the bundle again",
        ) from error


def _require_same(folder: Path, manifest: Manifest, entry: Path, every_byte: bool) -> None:
    """Raises BundleError unless the bundle's weights are those the entry was made of; a copy is hashed once."""
    mine = _weights(folder, manifest)
    try:
        record = _read_record(entry)
    except (OSError, ValidationError):
        record = None
    if record is not None and mine in record.copies:
        return
    if not every_byte:
        _require_hashes(folder, manifest)
    if record is not None and mine == _weights(folder, manifest):
        with suppress(OSError):  # the next load hashes again
            _write_record(entry, entry.name, record.bundle, record.hashes, (mine, *record.copies)[:KNOWN_COPIES])


def _weights(folder: Path, manifest: Manifest) -> tuple[_Known, ...]:
    """The files that a load does not hash, as they lie on the disk now."""
    large = (file.path for file in manifest.files if file.bytes > HASH_AT_LOAD_UP_TO)
    return tuple(_identity(folder / path) for path in large)


def _identity(path: Path) -> _Known:
    path = path.resolve()
    found = path.stat()
    times = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    return _Known(path=str(path), bytes=found.st_size, number=found.st_ino, **times)


def _require_hashes(folder: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        if file.bytes > HASH_AT_LOAD_UP_TO and sha256_of(folder / file.path) != file.sha256:
            raise changed(folder / file.path)


def require_space(root: Path, manifest: Manifest) -> None:
    root.mkdir(parents=True, exist_ok=True)
    needed = DISK_FACTOR * manifest.stored_bytes + DISK_RESERVE
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(f"{free / 1e9:.1f} GB are free where {needed / 1e9:.1f} GB are needed")


def write_entry(
    folder: Path,
    manifest: Manifest,
    graph: str,
    entry: Path,
    write: Callable[[Path, Path], bool],
    *,
    every_byte: bool,
    files: frozenset[str],
) -> bool:
    """Write an entry beside its place and rename it; entries it takes the place of go first.

    Args:
        write: writes `files`, of the graph that is the first argument, into the folder that is the second; False: they
            are of no use.

    Returns:
        False, and nothing is written: what `write` returned.

    Raises:
        OSError: the folder cannot be written.
        BundleError: the bundle's weights are not those of its manifest.
        EngineError: onnxruntime refuses the graph.
    """
    mine, before = _weights(folder, manifest), _identity(folder / graph)
    if not every_byte:
        _require_hashes(folder, manifest)
    read_unchanged(folder / graph, next(file.sha256 for file in manifest.files if file.path == graph))
    bundle = str(folder.resolve())
    _make_room(entry.parent, bundle)
    scratch = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".new-"))
    try:
        sound = write(folder / graph, scratch)
        if (
            _weights(folder, manifest) != mine or _identity(folder / graph) != before
        ):  # written to between the hash and onnxruntime's reading
            raise changed(folder)
        if not sound:
            return False
        for name in files:
            with (scratch / name).open("rb+") as stream:
                os.fsync(stream.fileno())  # a record that outlives the data would vouch for zeros
        _write_record(scratch, entry.name, bundle, {name: sha256_of(scratch / name) for name in files}, (mine,))
        try:
            scratch.rename(entry)
        except OSError:
            if not (entry.is_dir() and _is_sound(entry, False, files)):  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _write_record(
    folder: Path, name: str, bundle: str, hashes: Mapping[str, str], copies: tuple[tuple[_Known, ...], ...]
) -> None:
    """Write the record of the entry `name`, whose files are in `folder`."""
    files = {}
    for file, digest in sorted(hashes.items()):
        found = (folder / file).stat()
        times = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
        files[file] = _File(bytes=found.st_size, sha256=digest, **times)
    beside = folder / f".{RECORD}.new"
    record = _Record(entry=name, bundle=bundle, files=files, copies=copies)
    beside.write_text(record.model_dump_json(indent=2), encoding="utf-8", newline="\n")
    beside.replace(folder / RECORD)


def _make_room(root: Path, bundle: str) -> None:
    """Remove what the folder held before, what was left behind, and more bundles than are kept."""
    entries = []
    for path in root.iterdir():
        if path.name.startswith("."):
            if age(path) > ABANDONED_S:
                _remove(path)
        elif path.is_dir():
            entries.append(path)
    entries.sort(key=lambda path: age(path / RECORD))
    for index, path in enumerate(entries):
        if index >= KEPT - 1 or _bundle_of(path) == bundle:
            discard(path)


def _bundle_of(entry: Path) -> str | None:
    try:
        return _read_record(entry).bundle
    except (OSError, ValidationError):
        return None


def discard(entry: Path) -> bool:
    """Remove an entry whole or not at all: Windows renames no folder with a mapped file in it."""
    aside = entry.with_name(f".old-{entry.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        entry.rename(aside)
    except OSError:
        return False
    _remove(aside)
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not is_link(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def age(path: Path) -> float:
    """Seconds since it was written; infinite if it is not there."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return float("inf")
