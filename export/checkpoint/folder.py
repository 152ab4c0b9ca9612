"""What a folder holds that is no checkpoint edgephi reads: adapters, caches, other formats, quantized weights.

A person named the folder because a model lies in it, so the error says what does lie there and how to get at the rest.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from edgephi.errors import EdgephiError, SourceError, UnsupportedModelError
from edgephi.export.checkpoint.causes import MERGE
from edgephi.export.checkpoint.config import shown
from edgephi.files import NO_LINK, read_json_object, require_inside, unreadable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
CONFIG_LIMIT = 2**20
"""Bytes of config.json and its like: published ones have up to 10 kB."""

AGAIN = "Download the file again; it is damaged"
_ADAPTER_CONFIG = "adapter_config.json"
_QUANTIZED_KEYS = ("quantization_config", "quantization", "compression_config", "quant_config")
_QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
_METHOD_KEYS = ("quant_method", "quant_algo", "quant_type", "format", "bits", "w_bit", "load_in_4bit", "load_in_8bit")


def read_config(folder: Path) -> dict[str, object]:
    """config.json of a checkpoint folder.

    Raises:
        SourceError: there is none, and what lies there in its place; or it is no JSON object.
        UnsupportedModelError: the weights are quantized, by a key of it or a file beside it; or an adapter lies there.
    """
    path = folder / CONFIG
    if not is_file(path):
        raise _no_config(folder)
    config = read_object(path, CONFIG_LIMIT)
    _refuse_quantized(folder, config)
    if is_file(folder / _ADAPTER_CONFIG) and (is_file(folder / SINGLE) or is_file(folder / INDEX)):
        # transformers, with peft beside it, adds the adapter to the weights without a word
        raise UnsupportedModelError(
            f"an adapter (LoRA) lies beside the weights: {_ADAPTER_CONFIG}",
            where=folder,
            remedy=f"If the weights are merged already, remove {_ADAPTER_CONFIG}. {MERGE}",
        )
    return config


def read_object(path: Path, limit: int) -> dict[str, object]:
    """A JSON object of a checkpoint folder.

    Raises:
        SourceError: the file is a link out of the folder, too large, or no JSON object that every reader reads alike.
    """
    require_inside(path, path.parent, SourceError, NO_LINK)
    return read_json_object(path, error=SourceError, remedy=AGAIN, limit=limit)


def no_weights(folder: Path) -> SourceError | UnsupportedModelError:
    """The error for a folder without weights that edgephi reads."""
    names = _names(folder)
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if any(name.startswith("adapter_model.") for name in names):
        return _adapter(folder)
    if any(name.startswith("consolidated.") for name in names):
        what = "the weights are in the format of their maker's own code (consolidated), under other names"
        return SourceError(what, where=folder, remedy="Take the version for transformers: model.safetensors")
    if any(name.startswith("model-") for name in weights):
        what = f"there are shards such as {weights[0]}, and no {INDEX} that says what belongs to the model"
        return SourceError(what, where=folder, remedy=f"Download {INDEX} as well")
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        return SourceError(
            "the weights are pickled PyTorch files, which can run code when loaded",
            where=folder,
            remedy="Take the safetensors version of the checkpoint",
        )
    missing = f"there is no {SINGLE} and no {INDEX}"
    if weights:
        remedy = f"If {weights[0]} holds the whole model, rename it to {SINGLE}"
        return SourceError(f"{missing}, but {weights[0]}", where=folder, remedy=remedy)
    if (gguf := _gguf_in(names)) is not None:
        return SourceError(f"{missing}, but {gguf}", where=folder, remedy=f"Name the file: {folder / gguf}")
    return SourceError(missing, where=folder, remedy="Download the weights into this folder")


def is_file(path: Path) -> bool:
    """Whether there is a file to read.

    Raises:
        SourceError: something else has its name, a pipe or a folder; or the system does not let us know.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as problem:
        raise unreadable(problem, path, SourceError, "Check the folder's name and permissions") from problem
    if not stat.S_ISREG(mode):
        raise SourceError("this is no regular file", where=path, remedy="Remove it, or put the file itself there")
    return True


def _no_config(folder: Path) -> EdgephiError:
    names = _names(folder)
    if _ADAPTER_CONFIG in names or any(name.startswith("adapter_model.") for name in names):
        return _adapter(folder)
    if folder.name.startswith("models--") or {"snapshots", "blobs"} <= names or folder.name == "snapshots":
        snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
        inside = sorted(_names(snapshots))
        inner = str(snapshots / inside[0]) if len(inside) == 1 else f"a folder of {snapshots}"
        repository = folder.parent if folder.name == "snapshots" else folder
        hub_id = repository.name.removeprefix("models--").replace("--", "/")
        remedy = f"Name {inner}, or {hub_id}" if "/" in hub_id else f"Name {inner}"
        return SourceError(
            "this is a folder of the hub's cache; the checkpoint lies deeper", where=folder, remedy=remedy
        )
    if (gguf := _gguf_in(names)) is not None:
        what = f"this folder has no {CONFIG}, but {gguf}"
        return SourceError(what, where=folder, remedy=f"Name the file: {folder / gguf}")
    if "params.json" in names:
        what = f"this folder has no {CONFIG}: it is in the format of its maker's own code (params.json)"
        return SourceError(
            what, where=folder, remedy="Take the version for transformers: config.json, model.safetensors"
        )
    if "edgephi.json" in names:
        what = f"this folder has no {CONFIG}: it is a bundle, an export that is finished"
        return SourceError(what, where=folder, remedy="Run it with `edgephi generate`, or name the checkpoint's folder")
    return SourceError(
        f"this folder has no {CONFIG}", where=folder, remedy="Name the folder of a Hugging Face checkpoint"
    )


def _adapter(folder: Path) -> UnsupportedModelError:
    base = None
    if is_file(folder / _ADAPTER_CONFIG):
        base = read_object(folder / _ADAPTER_CONFIG, CONFIG_LIMIT).get("base_model_name_or_path")
    of = f" for {base[:200]}" if isinstance(base, str) and base else ""
    return UnsupportedModelError(f"this is an adapter (LoRA){of}, not a whole model", where=folder, remedy=MERGE)


def _refuse_quantized(folder: Path, config: Mapping[str, object]) -> None:
    remedy = "Use the checkpoint it was made from; if these weights are plain floats, remove {} and export again"
    for key in _QUANTIZED_KEYS:
        if value := config.get(key):
            raise UnsupportedModelError(
                f"{key} is set{_method(value)}: the weights are already quantized, or wait to be",
                where=folder / CONFIG,
                remedy=remedy.format(key),
            )
    for name in _QUANTIZED_FILES:
        if is_file(folder / name):
            raise UnsupportedModelError(
                f"there is a {name}: the weights are already quantized", where=folder, remedy=remedy.format(name)
            )


def _method(value: object) -> str:
    if not isinstance(value, dict):
        return f" to {shown(value)}"
    stated = ((key, value[key]) for key in _METHOD_KEYS if value.get(key))
    said = ", ".join(
        text if key == "quant_method" and isinstance(text, str) else f"{key} {text}"[:80] for key, text in stated
    )
    return f" ({said[:200]})" if said else ""


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as problem:
        raise unreadable(problem, folder, SourceError, "Check the folder's permissions") from problem


def _gguf_in(names: set[str]) -> str | None:
    return min((name for name in names if name.lower().endswith(".gguf")), default=None)
