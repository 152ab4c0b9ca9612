"""A model that Ollama has pulled: its manifest on this machine names the GGUF file. Nothing here touches the network.

Layout of the models folder: ollama/ollama, manifest/paths.go and types/model/name.go. Ollama's own template, system
prompt and parameters are left alone: the chat template is the one in the GGUF file.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from edgephi.errors import SourceError, UnsupportedModelError
from edgephi.export.checkpoint.config import shown
from edgephi.files import parse_json

SCHEME = "ollama:"
HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
# a newer Ollama keeps manifests under the second name of its registry, in a second folder
_ROOTS = (("manifests-v2", "ollama.com"), ("manifests", HOST), ("manifests", "ollama.com"))
_LAYER = "application/vnd.ollama.image."
_MANIFEST_LIMIT = 4 * 2**20
_LISTED = 20

_NAME = re.compile(
    r"(?:(?:(?P<host>\w[\w.:-]{0,349})/)?(?P<namespace>\w[\w-]{0,79})/)?(?P<model>\w[\w.-]{0,79})(?::(?P<tag>\w[\w.-]{0,79}))?",
    re.ASCII,
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class OllamaName:
    """A model's name as Ollama resolves it; every part is safe as the name of a folder."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        """Without the parts that Ollama leaves out."""
        parts = [self.host, self.namespace, self.model]
        if self.host in (HOST, "ollama.com"):
            parts = parts[2:] if self.namespace == NAMESPACE else parts[1:]
        return f"{'/'.join(parts)}:{self.tag}"


@dataclass(frozen=True)
class OllamaModel:
    """A pulled model's weights."""

    name: OllamaName
    digest: str
    """`sha256:` and 64 hexadecimal digits, as the manifest states it."""
    file: Path


def find_ollama_model(source: str) -> OllamaModel:
    """The GGUF file of `ollama:[[HOST/]NAMESPACE/]MODEL[:TAG]`, such as `ollama:phi4-mini`.

    The models folder is the one OLLAMA_MODELS names, or else `~/.ollama/models` and, on Linux, the folder of the
    system service.

    Raises:
        SourceError: not a model's name, not pulled, or a damaged manifest or file.
        UnsupportedModelError: the weights are not one GGUF file of a text model.
    """
    match = _NAME.fullmatch(source.removeprefix(SCHEME))
    if match is None:
        raise SourceError(
            "that is no name of an Ollama model", where=source, remedy="Write ollama:NAME or ollama:NAME:TAG"
        )
    name = OllamaName(match["host"] or HOST, match["namespace"] or NAMESPACE, match["model"], match["tag"] or TAG)
    for folder in _models_folders():
        for manifest in _manifest_paths(folder, name):
            if _is_file(manifest):
                return _model(folder, name, manifest)
    pulled = sorted({model for folder in _models_folders() for model in _pulled(folder)})
    more = f" and {len(pulled) - _LISTED} more" if len(pulled) > _LISTED else ""
    raise SourceError(
        f"Ollama has not pulled {name}; it has {', '.join(pulled[:_LISTED]) or 'nothing'}{more}",
        where=", ".join(str(folder) for folder in _models_folders()),
        remedy=f"Run `ollama pull {name}`, or set OLLAMA_MODELS to the folder Ollama uses",
    )


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        # the system service's folder is closed to users outside its group
        raise _unreadable(error, path) from error


def _models_folders() -> list[Path]:
    # Ollama strips blanks and quotes from its variables
    named = os.environ.get("OLLAMA_MODELS", "").strip().strip("\"'")
    if named:
        return [Path(named)]
    service = [Path("/usr/share/ollama/.ollama/models")] if sys.platform == "linux" else []
    try:
        own = [Path.home() / ".ollama" / "models"]
    except RuntimeError:  # a user without a home
        own = []
    return [*own, *service]


def _manifest_paths(folder: Path, name: OllamaName) -> list[Path]:
    tail = Path(name.namespace, name.model, name.tag)
    if name.host in (HOST, "ollama.com"):
        return [folder / root / host / tail for root, host in _ROOTS]
    return [folder / root / name.host / tail for root in ("manifests-v2", "manifests")]


def _pulled(folder: Path) -> list[str]:
    files = (file for root in ("manifests-v2", "manifests") for file in folder.glob(f"{root}/*/*/*/*"))
    return [str(OllamaName(*file.parts[-4:])) for file in files if not file.name.startswith(".")]


def _model(folder: Path, name: OllamaName, manifest: Path) -> OllamaModel:
    layers = _layers(folder, name, manifest)
    kinds = [str(layer.get("mediaType", "")).removeprefix(_LAYER) for layer in layers]
    for kind, what in (("adapter", "an adapter on top of its weights"), ("projector", "weights for images or sound")):
        if kind in kinds:
            raise UnsupportedModelError(f"{name} has {what}", where=manifest, remedy="Use a plain text model")
    if kinds.count("model") != 1:
        raise UnsupportedModelError(
            f"{name} has {kinds.count('model')} GGUF files",
            where=manifest,
            remedy="Use a model that is one GGUF file, or export from its safetensors folder",
        )
    layer = layers[kinds.index("model")]
    digest = _digest(layer.get("digest"), manifest, name)
    file = _blob(folder, digest)
    if not _is_file(file):
        raise SourceError(f"the weights of {name} are missing", where=file, remedy=f"Run `ollama pull {name}` again")
    size = file.stat().st_size
    if layer.get("size") != size:
        raise SourceError(
            f"the weights of {name} have {size:,} bytes, the manifest says {shown(layer.get('size'))}",
            where=file,
            remedy=f"Run `ollama pull {name}` again",
        )
    return OllamaModel(name, digest, file)


def _layers(folder: Path, name: OllamaName, manifest: Path) -> list[dict[str, object]]:
    """Layers of the manifest, or of the first GGUF variant in a list of variants."""
    stated = _read_json(manifest, name)
    variants = stated.get("manifests")
    if isinstance(variants, list):
        chosen = next((x for x in variants if isinstance(x, dict) and x.get("format") == "gguf"), None)
        if chosen is None:
            raise UnsupportedModelError(
                f"{name} has no GGUF variant", where=manifest, remedy="Export from the model's safetensors folder"
            )
        stated = chosen
        if "layers" not in chosen:
            digest = _digest(chosen.get("digest"), manifest, name)
            stated = _read_json(_blob(folder, digest), name, digest)
    layers = stated.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise _damaged("the manifest has no list of layers", manifest, name)
    return layers


def _read_json(file: Path, name: OllamaName, digest: str | None = None) -> dict[str, object]:
    again = f"Run `ollama pull {name}` again"
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MANIFEST_LIMIT + 1)
    except OSError as error:
        raise _unreadable(error, file) from error
    if len(raw) > _MANIFEST_LIMIT:
        raise _damaged("the manifest is no JSON object of moderate size", file, name)
    value = parse_json(raw, where=f"the manifest {file}", error=SourceError, remedy=again)
    if not isinstance(value, dict):
        raise _damaged("the manifest is no JSON object", file, name)
    if digest is not None and f"sha256:{hashlib.sha256(raw).hexdigest()}" != digest:
        raise _damaged("the manifest differs from its digest", file, name)
    return value


def _digest(value: object, manifest: Path, name: OllamaName) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _damaged(f"the manifest has the digest {shown(value)}", manifest, name)
    return value


def _blob(folder: Path, digest: str) -> Path:
    return folder / "blobs" / digest.replace(":", "-")


def _unreadable(error: OSError, where: Path) -> SourceError:
    return SourceError(
        f"Ollama's models folder cannot be read: {error.strerror}",
        where=where,
        remedy="Join the group `ollama`, or set OLLAMA_MODELS to a folder your user may read",
    )


def _damaged(what: str, where: Path, name: OllamaName) -> SourceError:
    return SourceError(what, where=where, remedy=f"Run `ollama pull {name}` again")
