"""SOURCE, as a person writes it, becomes a Checkpoint: a folder, a GGUF file, Ollama's model, or a hub id."""

from __future__ import annotations

import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Literal

from edgephi.errors import SourceError, UsageError
from edgephi.export.checkpoint.gguf import MAGIC, open_gguf
from edgephi.export.checkpoint.hub import HUB_ID, NAME_ONE, cut, download
from edgephi.export.checkpoint.ollama import SCHEME, find_ollama_model
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.spec import Checkpoint
from edgephi.files import refuse_lfs_pointer, unreadable

_HUB_PAGE = re.compile(
    rf"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)({HUB_ID.pattern})"
    r"(?:/(?:tree|blob|resolve|raw)/([^/?#\s]+))?(?:[/?#].*)?$",
    re.IGNORECASE,
)
_OLLAMA_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?ollama\.com/(?:library/)?([\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?)/?$", re.IGNORECASE
)


def open_source(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Describe the model that SOURCE names; downloads only when it is a hub id that is not in the hub's cache.

    Args:
        source: path of a checkpoint folder or a .gguf file, a model that Ollama has pulled such as `ollama:phi4-mini`,
            or a hub id such as `microsoft/Phi-4-mini-instruct`.
        revision: branch, tag or commit of a hub repository.

    Raises:
        SourceError: nothing of that name, or a damaged checkpoint.
        UnsupportedModelError: an adapter, quantized weights, or an architecture edgephi does not know.
        DownloadError: the hub cannot be reached, refuses, or offline mode is on.
        UsageError: a revision of something that has none.
    """
    name = str(source)
    require_revision(source, revision)
    if name.startswith(SCHEME):
        model = find_ollama_model(name)
        return replace(open_gguf(model.file), name=f"{SCHEME}{model.name}", revision=model.digest)
    require_source(source)
    path = Path(source)
    kind = _kind_of(path)
    if kind == "file":
        return _open_file(path)
    if kind == "folder":
        return open_folder(path)
    folder = download(name, revision)
    # the cache keeps a snapshot in a folder named after its commit
    return open_folder(folder, kind="hub", name=name, revision=folder.name)


def require_source(source: str | Path) -> None:
    """Find out before any work whether SOURCE names something that is here, or may be a hub id; nothing is opened.

    Raises:
        SourceError: neither; or Ollama has not pulled it.
    """
    name = str(source)
    if name.startswith(SCHEME):
        find_ollama_model(name)
        return
    path = Path(source)
    if _kind_of(path) is not None:
        return
    _refuse_address(name)
    if path.is_absolute() or not HUB_ID.fullmatch(name):
        raise SourceError(
            "there is no such file or folder, and it is no hub id",
            where=cut(name),
            remedy=NAME_ONE,
        )


def require_revision(source: str | Path, revision: str | None) -> None:
    """Refuse a source that names nothing, and a revision of what has none; nothing is opened.

    Raises:
        UsageError: it is empty, or has no revisions.
        SourceError: the system does not let us know what lies there.
    """
    name = str(source)
    if not name.strip():
        raise UsageError("the source is empty", remedy=f"{NAME_ONE}; `.` is the current folder")
    if revision is None:
        return
    if name.startswith(SCHEME):
        remedy = "An Ollama model's version is its tag: write ollama:NAME:TAG"
    elif _kind_of(Path(source)) is not None:
        remedy = "Leave --revision out, or name the repository by its hub id"
    else:
        return
    raise UsageError(f"a revision ({revision}) belongs to a hub id, and this is none", where=name, remedy=remedy)


def _refuse_address(name: str) -> None:
    """Raises SourceError for the address of a page, and says which hub id belongs to it."""
    if (found := _HUB_PAGE.match(name)) is not None:
        at = f" with --revision {found[2]}" if found[2] and found[2] != "main" else ""
        raise SourceError("this is the address of a page", where=cut(name), remedy=f"Write {found[1]}{at}")
    if (found := _OLLAMA_PAGE.match(name)) is not None:
        model = found[1]
        remedy = f"Fetch it with `ollama pull {model}`, then write {SCHEME}{model}"
        raise SourceError("this is the address of a page", where=cut(name), remedy=remedy)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        what = "this is an address, and only hub ids are downloaded"
        raise SourceError(what, where=cut(name), remedy=f"Download it yourself, or: {NAME_ONE}")


def _kind_of(path: Path) -> Literal["file", "folder"] | None:
    """What the path names; None: nothing."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        if isinstance(problem, NotADirectoryError):
            return None
        where = Path(cut(str(path)))
        raise unreadable(problem, where, SourceError, "Check the path and its permissions") from problem
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    raise SourceError("the source is neither a file nor a folder", where=path, remedy="Name a checkpoint")


def _open_file(path: Path) -> Checkpoint:
    """A GGUF file, which is known by its first bytes: caches and Ollama's store keep it without its ending."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as problem:
        raise unreadable(problem, path, SourceError, "Check the file's permissions") from problem
    if start.startswith(MAGIC) or path.suffix.lower() == ".gguf":
        return open_gguf(path)
    refuse_lfs_pointer(start, path, SourceError)
    remedy = "Name the checkpoint's folder"
    if path.suffix == ".safetensors" or path.name == "config.json":
        remedy = f"Name the checkpoint's folder, {path.parent}"
    raise SourceError("the source is a single file that is no GGUF file", where=path, remedy=remedy)
