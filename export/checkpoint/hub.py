"""Checkpoints on the Hugging Face hub: which files of a repository are taken, how large they are, and fetching them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from edgephi.errors import DownloadError, EdgephiError, SourceError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAME_ONE = "Name a folder, a .gguf file, ollama:NAME, or a hub id such as microsoft/Phi-4-mini-instruct"

# weights, configuration and tokenizer; no pickled weights, no code
HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    # small, and they say what the weights are: an adapter's, or quantized
    "adapter_config.json",
    "*quant*_config.json",
    "added_tokens.json",
    "chat_template.*",
]


@dataclass(frozen=True)
class HubFile:
    """A file that a download takes."""

    name: str
    bytes: int
    sha256: str | None
    """None: a small one, which the hub keeps in git."""


@dataclass(frozen=True)
class HubFiles:
    """What a download takes from a repository."""

    commit: str
    files: tuple[HubFile, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


def cut(name: str) -> str:
    """What a person typed, short enough for a message."""
    return name if len(name) <= 200 else f"{name[:200]} …"


def download(name: str, revision: str | None) -> Path:
    """The folder of a repository's checkpoint in the hub's cache, downloaded if it is not there. Whole files that an
    earlier download left are not fetched again.

    Raises:
        DownloadError: the hub cannot be reached, refuses, or offline mode is on.
        SourceError: the name is no hub id.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))


def list_files(name: str, revision: str | None) -> HubFiles:
    """The files that `download` would take, asked of the hub.

    Raises:
        DownloadError, SourceError: as `download`.
    """
    from huggingface_hub import HfApi

    with hub_errors(name, revision):
        found = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = tuple(
            HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in found.siblings or ()
            if any(fnmatch(file.rfilename, pattern) for pattern in HUB_FILES)
        )
        return HubFiles(str(found.sha), files)


def repository_folder(name: str) -> Path:
    """Where the hub's cache keeps a repository (huggingface_hub, "Understand caching"); it need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


@contextmanager
def no_bars() -> Iterator[None]:
    """While huggingface_hub finds what was downloaded, it draws none of its own."""
    from huggingface_hub import utils

    if utils.are_progress_bars_disabled():  # type: ignore[attr-defined]  # documented there, as the other two
        yield
        return
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """What the hub's client raises becomes a sentence."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except EdgephiError:
        raise
    except GatedRepoError as error:
        raise DownloadError(
            "the repository asks its users to accept terms",
            where=name,
            remedy="Accept them on its page, then run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(
            f"the repository has no revision {revision}", where=name, remedy="Name a branch, tag or commit that exists"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            "there is no such folder here and no such repository on the hub, or it is private",
            where=name,
            remedy="Check the spelling; for a private repository run `hf auth login`",
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise DownloadError(
            "the checkpoint is not in the hub's cache and the hub cannot be reached",
            where=name,
            remedy="Go online and unset HF_HUB_OFFLINE, or name a local folder",
        ) from error
    except HFValidationError as error:
        raise SourceError(
            "there is no such folder here, and it is no hub id",
            where=cut(name),
            remedy=NAME_ONE,
        ) from error
    except Exception as error:  # of the hub's client, its HTTP library and the system
        # the first line only: the rest may quote request headers
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"the download failed: {reason}", where=name, remedy="Run the same command again; it resumes"
        ) from error
