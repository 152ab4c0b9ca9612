"""The process that downloads a checkpoint: it can be ended at any moment, whatever the network or a library is at.

huggingface_hub begins a file anew that an ended download left unfinished (since 2.0), and a shard has 5 GB. So the
large files are fetched here first, each into a file of this module's that grows from one run to the next, and put where
the hub's cache keeps them. huggingface_hub then finds them and fetches the rest.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

from edgephi.bundle import sha256_of
from edgephi.child import read_arguments, standard_streams
from edgephi.errors import DownloadError, EdgephiError
from edgephi.export.checkpoint.hub import HubFile, HubFiles, download, hub_errors, list_files, repository_folder
from edgephi.lock import locked

UNFINISHED = ".edgephi-unfinished"
"""Ending of a file that is being fetched, in the folder `blobs` of the repository's cache."""
LARGE = 2**20
"""Bytes from which a file is fetched so that it can go on."""
AT_ONCE = 4
TELL_EVERY_S = 0.2
CHUNK = 2**18
"""Bytes that are written at once; huggingface_hub's own 10 MB would be lost when a slow download ends."""


def main() -> None:
    """The child's side: arguments on stdin, lines of JSON on stdout.

    Each line is {"done": bytes, "total": bytes or null}, the last one {"commit": ...} or {"error": ...}.
    """
    incoming, outgoing = standard_streams()
    arguments = read_arguments(incoming)
    name, revision = str(arguments["name"]), arguments["revision"]
    try:
        _tell(outgoing, {"commit": fetch(name, None if revision is None else str(revision), outgoing)})
    except EdgephiError as error:
        told = {"kind": type(error).__name__, "what": error.what, "where": error.where, "remedy": error.remedy}
        _tell(outgoing, {"error": told})


def fetch(name: str, revision: str | None, outgoing: BinaryIO) -> str:
    """Download a repository's checkpoint into the hub's cache; the commit it is of.

    Raises:
        DownloadError, SourceError: as `edgephi.export.checkpoint.hub.download`.
    """
    try:
        wanted = list_files(name, revision)
    except DownloadError:
        # offline, perhaps, with all of it in the cache; if not, this says why
        return download(name, revision).name
    repository = repository_folder(name)
    before = _regular_bytes(repository)
    missing = [file for file in wanted.files if not (repository / "snapshots" / wanted.commit / file.name).exists()]
    # what an earlier run left of these counts as done
    left = sum(path.stat().st_size for path in repository.glob(f"blobs/*{UNFINISHED}"))
    base = wanted.bytes - sum(file.bytes for file in missing) + left - before

    def tell() -> None:
        done = max(0, min(wanted.bytes, base + _regular_bytes(repository)))
        _tell(outgoing, {"done": done, "total": wanted.bytes})

    with _telling(tell):
        _fetch_large(name, wanted, missing, repository)
        return download(name, revision).name


def _fetch_large(name: str, wanted: HubFiles, missing: list[HubFile], repository: Path) -> None:
    large = [file for file in missing if file.sha256 is not None and file.bytes >= LARGE]
    with hub_errors(name, wanted.commit), ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(_fetch_file, name, wanted.commit, file, repository / "blobs") for file in large]:
            done.result()


def _fetch_file(name: str, commit: str, file: HubFile, blobs: Path) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

    assert file.sha256 is not None
    target = blobs / file.sha256
    unfinished = blobs / f"{file.sha256}{UNFINISHED}"
    if target.exists():
        return
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    url = hf_hub_url(name, file.name, revision=commit)
    headers = build_hf_headers()
    location = get_hf_file_metadata(url).location
    if urlparse(location).netloc != urlparse(url).netloc:  # a signed address elsewhere, which is to see no token
        headers.pop("authorization", None)
    blobs.mkdir(parents=True, exist_ok=True)
    with lock_of_blob(blobs, file.sha256):
        with unfinished.open("ab") as stream:
            there = stream.tell()
            if there > file.bytes:
                stream.truncate(0)
                there = 0
            http_get(location, stream, resume_size=there, headers=headers, expected_size=file.bytes)
        if there and sha256_of(unfinished) != file.sha256:
            unfinished.unlink()
            raise DownloadError(
                "a file that was fetched in parts is not what the hub has; it is thrown away",
                where=file.name,
                remedy="Run the same command again",
            )
        unfinished.replace(target)


def lock_of_blob(blobs: Path, sha256: str) -> AbstractContextManager[None]:
    """Held by who fetches a large file, or removes what was fetched of it."""
    return locked(blobs / f"{sha256}.edgephi-lock", _fetched_elsewhere)


def _fetched_elsewhere(holder: str, path: Path) -> DownloadError:
    return DownloadError(
        f"another process{holder} is downloading this file",
        where=path,
        remedy="Wait until it ends, then run this again",
    )


def _regular_bytes(folder: Path) -> int:
    """Of the files below a folder, links apart, which lead to others of it."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # finished and renamed meanwhile
            found = path.lstat()
            total += 0 if path.is_symlink() or path.is_dir() else found.st_size
    return total


@contextmanager
def _telling(tell: Callable[[], None]) -> Iterator[None]:
    """Call a function now, every `TELL_EVERY_S` while the block runs, and once more at its end."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(TELL_EVERY_S):
            tell()

    tell()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        tell()


def _tell(outgoing: BinaryIO, line: dict[str, object]) -> None:
    outgoing.write(json.dumps(line).encode() + b"\n")
    outgoing.flush()


if __name__ == "__main__":
    main()
