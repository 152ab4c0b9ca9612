"""Which weights are meant: a folder or file that lies at the same place on every machine, compared byte by byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgephi.bundle import MANIFEST, contents_sha256, read_manifest, sha256_of
from edgephi.errors import BundleError, UsageError


def local_source(named: str | Path) -> Path:
    """The whole path of a folder or file.

    Raises:
        UsageError: it is a name that the other machines would look up themselves, or it is not there.
    """
    path = Path(named)
    if not path.exists():
        raise UsageError(
            f"{str(named)!r} may be other weights on another machine",
            remedy="Download it, and name a folder or file that every machine has at the same place",
        )
    return path.resolve()


def source_sha256(path: Path) -> str:
    """Of all files of a checkpoint, or of a bundle as its manifest lists them.

    Raises:
        BundleError: it is not there, or a file cannot be read.
    """
    try:
        if (path / MANIFEST).is_file():
            return contents_sha256(read_manifest(path))
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
        lines = [f"{file.name}\0{sha256_of(file)}\n" for file in files if not file.name.startswith(".")]
    except OSError as error:
        raise BundleError(
            f"it cannot be read: {error.strerror or error}", where=path, remedy="Copy it to this machine"
        ) from error
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def require_source(path: Path, sha256: str) -> None:
    """
    Raises:
        BundleError: other weights lie here than on the machine that asks.
    """
    if source_sha256(path) != sha256:
        raise BundleError("these are other weights than the ones meant", where=path, remedy="Copy those here")
