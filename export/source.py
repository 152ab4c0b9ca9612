"""SOURCE, as a person writes it, becomes a Checkpoint: a folder, a GGUF file, Ollama's model, or a hub id."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from edgephi.errors import DownloadError, SourceError
from edgephi.export.gguf_reader import open_gguf
from edgephi.export.ollama import SCHEME, find_ollama_model
from edgephi.export.safetensors_reader import open_folder
from edgephi.export.spec import Checkpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# weights, configuration and tokenizer; no pickled weights, no code
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "chat_template.*",
]


def open_source(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Describe the model that SOURCE names; downloads only when it is a hub id that is not in the hub's cache.

    Args:
        source: path of a checkpoint folder or a .gguf file, a model that Ollama has pulled such as `ollama:phi4-mini`,
            or a hub id such as `microsoft/Phi-4-mini-instruct`.
        revision: branch, tag or commit of a hub repository.

    Raises:
        SourceError: nothing of that name, or a damaged checkpoint.
        DownloadError: the hub cannot be reached, refuses, or offline mode is on.
    """
    name = str(source)
    if name.startswith(SCHEME):
        model = find_ollama_model(name)
        return replace(open_gguf(model.file), name=f"{SCHEME}{model.name}", revision=model.digest)
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(
                "the source is a single file that is no .gguf", where=path, remedy="Name the checkpoint's folder"
            )
        return open_gguf(path)
    if path.is_dir():
        return open_folder(path)
    if path.is_absolute() or not _HUB_ID.fullmatch(name):
        raise SourceError(
            "there is no such file or folder, and it is no hub id",
            where=source,
            remedy="Name a folder, a .gguf file, ollama:NAME, or a hub id such as microsoft/Phi-4-mini-instruct",
        )
    folder = _download(name, revision)
    # the cache keeps a snapshot in a folder named after its commit
    return open_folder(folder, kind="hub", name=name, revision=folder.name)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
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
    except (HfHubHTTPError, OSError) as error:
        # the first line only: the rest may quote request headers
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"the download failed: {reason}", where=name, remedy="Run the same command again; it resumes"
        ) from error
