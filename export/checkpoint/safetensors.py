"""A Hugging Face folder (config.json, safetensors in one file or in shards) as a Checkpoint.

The header is read here rather than by the safetensors package, because that package maps the file and tells no offsets
(see `export/checkpoint/tensors.py`); it is the reference in the tests. Format: huggingface/safetensors README,
"Format".

What belongs to the model is what the index says, as in transformers: a shard may hold more. A folder with an index of
shards and a model.safetensors beside it holds two models, of which transformers takes the second without a word; that
is refused. An index none of whose shards is there is no second model: `save_pretrained` removes old shards and leaves
their index, and the one file is the model. Holes between tensors, which the format forbids, hurt nobody and are let
through.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Literal, TypeGuard

from edgephi.errors import SourceError, WeightError
from edgephi.export.checkpoint.config import shown
from edgephi.export.checkpoint.folder import AGAIN, CONFIG, INDEX, SINGLE, is_file, no_weights, read_config, read_object
from edgephi.export.checkpoint.tensors import PLAIN_TYPES, UNREAD_TYPES, stored_bytes, unread_type
from edgephi.export.spec import Checkpoint, TensorRef
from edgephi.files import NO_LINK, parse_json, refuse_lfs_pointer, require_inside, require_regular, unreadable

HEADER_LIMIT = 16 * 2**20
"""Bytes of a header, of all headers of a checkpoint together, and of the index. The format allows 100 MB; Phi-3.5-MoE's
5,000 tensors take 0.7 MB, and what 100 MB of JSON becomes takes half a minute and gigabytes."""
MAX_TENSORS = 100_000
LONGEST_NAME = 512
MAX_DIMENSIONS = 8
LARGEST_DIMENSION = 1 << 48


def open_folder(
    folder: Path, *, kind: Literal["folder", "hub"] = "folder", name: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Describe the checkpoint in a folder; reads headers only.

    Raises:
        SourceError: something is missing, cut short or malformed; the message names the file.
        UnsupportedModelError: the weights are quantized, or an adapter's.
        WeightError: a dtype or shape that is none.
    """
    config = read_config(folder)
    wanted = _weight_files(folder)
    tensors: dict[str, TensorRef] = {}
    left = HEADER_LIMIT
    for file, names in wanted.items():
        refs, used = _read_header(file, left)
        left -= used
        found = {ref.name: ref for ref in refs}
        if names is not None:
            if missing := sorted(names - found.keys()):
                raise SourceError(
                    f"the index says that {file.name} holds the tensor {missing[0]}, which it does not",
                    where=file,
                    remedy="Download this file and the index again; they are of different versions",
                )
            found = {name: found[name] for name in found if name in names}
        tensors |= found
    return Checkpoint(
        kind=kind,
        name=name or _resolved(folder).name,
        revision=revision,
        config=config,
        config_where=str(folder / CONFIG),
        tensors=tensors,
        files=tuple(wanted),
        folder=folder,
    )


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold the weights and which of their tensors are meant; None: all of them."""
    single = is_file(folder / SINGLE)
    if is_file(folder / INDEX):
        shards = _shards(folder)
        there = [file.name for file in shards if is_file(file)]
        if single and not there:
            return {folder / SINGLE: None}
        if single and folder / SINGLE not in shards:
            raise SourceError(
                f"there is {SINGLE}, and {INDEX}, which names {there[0]}: two models in one folder",
                where=folder,
                remedy=f"Remove {SINGLE}, or the index with its shards, whichever is the older one",
            )
        if missing := [file.name for file in shards if file.name not in there]:
            what = f"the index names {missing[0]}, which is not there"
            raise SourceError(what, where=folder / INDEX, remedy=f"Download {missing[0]} as well")
        return {file: set(names) for file, names in shards.items()}
    if single:
        return {folder / SINGLE: None}
    raise no_weights(folder)


def _shards(folder: Path) -> dict[Path, list[str]]:
    """The files that the index names, by name, and the tensors of each; whether they are there is not looked at."""
    index = read_object(folder / INDEX, HEADER_LIMIT)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError("weight_map is missing or no object of texts", where=folder / INDEX, remedy=AGAIN)
    if not 0 < len(weight_map) <= MAX_TENSORS:
        what = f"weight_map names {len(weight_map):,} tensors, where 1 to {MAX_TENSORS:,} are possible"
        raise SourceError(what, where=folder / INDEX, remedy=AGAIN)
    _check_names(folder / INDEX, weight_map.keys() | set(weight_map.values()))
    shards: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        shards.setdefault(file, []).append(tensor)
    for name in shards:
        pure = PurePosixPath(name)
        if len(pure.parts) != 1 or "\\" in name or ":" in name or "\0" in name or name == "..":
            what = f"the index names {shown(name)}, outside the folder"
            raise SourceError(what, where=folder / INDEX, remedy=AGAIN)
        if not name.endswith(".safetensors"):
            what = f"the index names {shown(name)}, which is no safetensors file"
            raise SourceError(what, where=folder / INDEX, remedy="Take the safetensors version of the checkpoint")
    return {folder / name: shards[name] for name in sorted(shards)}


def read_header(file: Path) -> list[TensorRef]:
    """Every tensor of one safetensors file, with offsets checked against the file's size.

    A tensor of a type that edgephi does not read is among them; whoever needs it refuses it.

    Raises:
        SourceError: no regular file or a link out of its folder, a Git LFS pointer, a header cut short, too large or
            malformed, data missing, tensors that overlap.
        WeightError: a dtype or shape that is none.
    """
    return _read_header(file, HEADER_LIMIT)[0]


def _read_header(file: Path, limit: int) -> tuple[list[TensorRef], int]:
    """Tensors, and bytes of the header, which may have `limit`."""
    require_inside(file, file.parent, SourceError, NO_LINK)
    require_regular(file, SourceError, AGAIN)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(64)
            length = int.from_bytes(start[:8], "little")
            _check_start(file, start, size, length, limit)
            stream.seek(8)
            text = stream.read(length)
    except OSError as problem:
        raise unreadable(problem, file, SourceError, AGAIN) from problem
    header = parse_json(text, where=file, error=SourceError, remedy=AGAIN)
    if not isinstance(header, dict):
        raise SourceError("the header holds no JSON object", where=file, remedy=AGAIN)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    _check_names(file, entries)
    data = 8 + length
    refs = [_tensor(name, entry, file, data) for name, entry in entries.items()]
    check_places(file, size, data, refs)
    return refs, length


def _check_start(file: Path, start: bytes, size: int, length: int, limit: int) -> None:
    refuse_lfs_pointer(start, file, SourceError)
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        what = "the file is a pickled PyTorch file by another name, which can run code when loaded"
        raise SourceError(what, where=file, remedy="Take the safetensors version of the checkpoint")
    if start.startswith(b"GGUF"):
        what = "the file is a GGUF file by another name"
        raise SourceError(what, where=file, remedy=f"Name the file itself: {file}")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what = "the file is a web page, saved in place of the weights"
        raise SourceError(what, where=file, remedy="Download the file itself, with the hub's own tools")
    if size < 8 or length > size - 8:
        raise SourceError("the file is no safetensors file, or was cut short", where=file, remedy=AGAIN)
    if length > limit:
        what = f"the header has {length:,} bytes, more than the {limit:,} that are left for a checkpoint's headers"
        raise SourceError(what, where=file, remedy=AGAIN)


def _check_names(file: Path, names: Collection[str]) -> None:
    if len(names) > MAX_TENSORS:
        what = f"it names {len(names):,} tensors, more than the {MAX_TENSORS:,} that are possible"
        raise SourceError(what, where=file, remedy=AGAIN)
    longest = max(names, key=len, default="")
    if len(longest) > LONGEST_NAME:
        what = f"a name of a tensor or file has {len(longest):,} characters: {longest[:40]} …"
        raise SourceError(what, where=file, remedy=AGAIN)


def check_places(file: Path, size: int, data: int, refs: Collection[TensorRef]) -> None:
    """Raises SourceError when tensors overlap, begin before the data or end behind the file."""
    end = data
    for ref in sorted((ref for ref in refs if ref.bytes), key=lambda ref: (ref.offset, ref.bytes)):
        if ref.offset < end:
            raise SourceError(f"tensor {ref.name} overlaps another", where=file, remedy=AGAIN)
        end = ref.offset + ref.bytes
        if end > size:
            raise SourceError(
                f"the file has {size:,} bytes; tensor {ref.name} ends at {end:,}",
                where=file,
                remedy="Download the file again; it was cut short",
            )


def _tensor(name: str, entry: object, file: Path, data: int) -> TensorRef:
    if not isinstance(entry, dict):
        raise SourceError(f"the header's entry of tensor {name} is no object", where=file, remedy=AGAIN)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise SourceError(f"the header's entry of tensor {name} is malformed", where=file, remedy=AGAIN)
    if not isinstance(dtype, str):
        raise SourceError(f"tensor {name} has the dtype {shown(dtype)}, which is no text", where=file, remedy=AGAIN)
    start, stop = offsets
    ref = TensorRef(name, file, data + start, stop - start, tuple(shape), dtype)
    if dtype not in PLAIN_TYPES and dtype not in UNREAD_TYPES:
        raise unread_type(ref)
    if ref.bytes != stored_bytes(dtype, ref.shape):
        raise WeightError(
            f"tensor {name} of shape {ref.shape} and dtype {dtype} has {ref.bytes:,} bytes", where=file, remedy=AGAIN
        )
    return ref


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(number) is int and 0 <= number <= LARGEST_DIMENSION for number in value)
    )


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as problem:  # RuntimeError: a circle of links, in older Pythons
        raise unreadable(problem, folder, SourceError, "Check the folder's name") from problem
