"""A Hugging Face folder (config.json, safetensors in one file or in shards) as a Checkpoint.

The header is read here rather than by the safetensors package, because that package maps the file and tells no offsets
(see `export/read.py`); it is the reference in the tests. Format: huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Literal, TypeGuard

from edgephi.errors import SourceError, WeightError
from edgephi.export.read import PLAIN_TYPES, stored_bytes
from edgephi.export.spec import Checkpoint, TensorRef

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # the format's own limit
JSON_LIMIT = 64 * 2**20

AGAIN = "Download the file again; it is damaged"


def open_folder(
    folder: Path, *, kind: Literal["folder", "hub"] = "folder", name: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Describe the checkpoint in a folder; reads headers only.

    Raises:
        SourceError: something is missing, cut short or malformed; the message names the file.
    """
    if not (folder / "config.json").is_file():
        raise SourceError(
            "this folder has no config.json", where=folder, remedy="Name the folder of a Hugging Face checkpoint"
        )
    config = read_json(folder / "config.json")
    files = _weight_files(folder)
    tensors: dict[str, TensorRef] = {}
    for file in files:
        for ref in read_header(file):
            if ref.name in tensors:
                raise SourceError(
                    f"tensor {ref.name} stands in two files", where=file, remedy="Remove the file that does not belong"
                )
            tensors[ref.name] = ref
    return Checkpoint(
        kind=kind,
        name=name or folder.resolve().name,
        revision=revision,
        config=config,
        config_where=str(folder / "config.json"),
        tensors=tensors,
        files=files,
        folder=folder,
    )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / INDEX).is_file():
        return _shards(folder)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise SourceError(
            "the weights are pickled PyTorch files, which can run code when loaded",
            where=folder,
            remedy="Take the safetensors version of the checkpoint",
        )
    raise SourceError(
        f"there is no {SINGLE} and no {INDEX}", where=folder, remedy="Download the weights into this folder"
    )


def _shards(folder: Path) -> tuple[Path, ...]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError("weight_map is missing or no object of texts", where=folder / INDEX, remedy=AGAIN)
    files = []
    for name in sorted(set(weight_map.values())):
        pure = PurePosixPath(name)
        if len(pure.parts) != 1 or "\\" in name or ":" in name or name == "..":
            raise SourceError(f"the index names {name!r}, outside the folder", where=folder / INDEX, remedy=AGAIN)
        if not (folder / name).is_file():
            raise SourceError(
                f"the index names {name}, which is not there", where=folder / INDEX, remedy=f"Download {name} as well"
            )
        files.append(folder / name)
    return tuple(files)


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file of sane size.

    Raises:
        SourceError: not JSON, or no object; the message gives the line.
    """
    if path.stat().st_size > JSON_LIMIT:
        raise SourceError("the file is implausibly large", where=path, remedy=AGAIN)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"the file is no JSON: {error}", where=path, remedy=AGAIN) from error
    if not isinstance(value, dict):
        raise SourceError("the file holds no JSON object", where=path, remedy=AGAIN)
    return value


def read_header(file: Path) -> list[TensorRef]:
    """Every tensor of one safetensors file, with offsets checked against the file's size.

    Raises:
        SourceError: header cut short or malformed, data missing, tensors that overlap.
        WeightError: a dtype or shape edgephi cannot read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise SourceError("the file is no safetensors file, or was cut short", where=file, remedy=AGAIN)
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"the header is no JSON: {error}", where=file, remedy=AGAIN) from error
    if not isinstance(header, dict):
        raise SourceError("the header holds no JSON object", where=file, remedy=AGAIN)
    data = 8 + length
    refs = [_tensor(name, entry, file, data) for name, entry in header.items() if name != "__metadata__"]
    end = data
    for ref in sorted(refs, key=lambda ref: (ref.offset, ref.bytes)):
        if ref.offset < end:
            raise SourceError(f"tensor {ref.name} overlaps another", where=file, remedy=AGAIN)
        end = ref.offset + ref.bytes
        if end > size:
            raise SourceError(
                f"the file has {size:,} bytes; tensor {ref.name} ends at {end:,}",
                where=file,
                remedy="Download the file again; it was cut short",
            )
    return refs


def _tensor(name: str, entry: object, file: Path, data: int) -> TensorRef:
    if not isinstance(entry, dict):
        raise SourceError(f"the header's entry of tensor {name} is no object", where=file, remedy=AGAIN)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise SourceError(f"the header's entry of tensor {name} is malformed", where=file, remedy=AGAIN)
    if dtype not in PLAIN_TYPES:
        raise WeightError(
            f"tensor {name} has dtype {dtype!r}",
            where=file,
            remedy=f"Use a checkpoint in {', '.join(PLAIN_TYPES)}; quantized checkpoints are read from GGUF",
        )
    start, stop = offsets
    if stop - start != stored_bytes(dtype, tuple(shape)):
        raise WeightError(
            f"tensor {name} of shape {tuple(shape)} and dtype {dtype} has {stop - start:,} bytes",
            where=file,
            remedy=AGAIN,
        )
    return TensorRef(name, file, data + start, stop - start, tuple(shape), dtype)


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
