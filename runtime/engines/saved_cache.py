"""A KV cache in a file: one safetensors file with the tokens, the tensors and a key that says whose cache it is.

The tokens are a person's text, so only the user may read the file. What is read is believed when every byte of it is
what saving would have written: the header is compared with the one that follows from the key, the model's tensors and
the number of tokens, and the data with its SHA-256. Format: huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import Manifest
from edgephi.errors import EngineError, PromptError
from edgephi.files import parse_json, require_regular, unreadable, unwritable
from edgephi.runtime.engines.base import require_in_vocabulary

FORMAT = "edgephi-kv-cache-1"
HEADER_LIMIT = 4 * 2**20
"""Bytes; a tensor's entry takes about 100, and the largest Phi has 80 of them."""
UNFINISHED = ".new"
"""Ending of a file that is being written."""
TOKENS = "tokens"
ROWS = -1
"""In a shape: one row for each token."""
AGAIN = "Delete this file; the prompt is then computed again"
_TYPES = {
    np.dtype(np.int32): ("I32", 4),
    np.dtype(np.float32): ("F32", 4),
    np.dtype(np.float16): ("F16", 2),
    np.dtype(np.uint8): ("U8", 1),
    np.dtype(np.int8): ("I8", 1),
}
"""The format's names, and bytes of a number."""


@dataclass(frozen=True)
class CacheTensor:
    """A tensor of a model's KV cache."""

    dtype: np.dtype[Any]
    """float32, float16, or codes of 8 bits."""
    shape: tuple[int, ...]
    """With `ROWS` in one place."""

    def shape_for(self, tokens: int) -> tuple[int, ...]:
        return tuple(tokens if size == ROWS else size for size in self.shape)


@dataclass(frozen=True)
class SavedCache:
    """What a file held: token ids, and tensors by name that are as long."""

    tokens: list[int]
    tensors: dict[str, NDArray[Any]]


def bundle_digest(manifest: Manifest) -> str:
    """SHA-256 of what the manifest says of every file."""
    files = sorted((entry.path, entry.sha256) for entry in manifest.files)
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def cache_key(manifest: Manifest, engine: str, **facts: str) -> dict[str, str]:
    """What a cache depends on: every file of the bundle, the engine, onnxruntime's version, and what the engine adds
    (the type of keys and values, the rope's regime, …)."""
    import onnxruntime

    return {"bundle": bundle_digest(manifest), "engine": engine, "onnxruntime": str(onnxruntime.__version__), **facts}


def write_cache(file: Path, key: Mapping[str, str], tokens: Sequence[int], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a cache; a file that is there is replaced whole or not at all.

    On Windows the file has the permissions of its folder.

    Args:
        tensors: one row for each token, in the order they are to be written in.

    Raises:
        OutputError: the file cannot be written.
    """
    parts = {TOKENS: np.asarray(tokens, np.int32), **tensors}
    digest = hashlib.sha256()
    for array in parts.values():
        digest.update(_bytes(array))
    entries = _entries({name: (array.dtype, array.shape) for name, array in parts.items()})
    header = json.dumps({"__metadata__": _metadata(key, digest.hexdigest()), **entries}).encode()
    header += b" " * (-len(header) % 8)
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for array in parts.values():
                stream.write(_bytes(array))
        new.replace(file)
    except BaseException as problem:  # Ctrl-C too: it holds somebody's text
        with suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise unwritable(problem, file, "Free disk space, or name another place") from problem
        raise


def read_cache(
    file: Path, key: Mapping[str, str], tensors: Mapping[str, CacheTensor], *, capacity: int, vocabulary: int
) -> SavedCache:
    """Read a cache.

    Args:
        key: of the engine that is to go on with it.
        tensors: the model's, by name, in the order they were written in.
        capacity: most tokens it may have.

    Raises:
        EngineError: the file is missing, no saved cache, damaged, of another key, or has more tokens.
    """
    require_regular(file, EngineError, AGAIN)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length, header = _header(file, stream, size)
            expected_digest = _require_key(file, header.get("__metadata__"), key)
            count = _token_count(file, header.get(TOKENS), capacity)
            parts = {TOKENS: CacheTensor(np.dtype(np.int32), (ROWS,)), **tensors}
            shapes = {name: (tensor.dtype, tensor.shape_for(count)) for name, tensor in parts.items()}
            data = _require_entries(file, header, _entries(shapes))
            if size != 8 + length + data:
                raise _refused(file, f"it has {size:,} bytes instead of {8 + length + data:,}")
            digest = hashlib.sha256()
            arrays: dict[str, NDArray[Any]] = {name: np.empty(shape, dtype) for name, (dtype, shape) in shapes.items()}
            for array in arrays.values():
                if stream.readinto(_bytes(array)) != array.nbytes:
                    raise _refused(file, "it was cut short while it was read")
                digest.update(_bytes(array))
    except OSError as problem:
        raise unreadable(problem, file, EngineError, AGAIN) from problem
    except MemoryError as problem:
        raise EngineError("there is no memory for it", where=file, remedy="Close other programs") from problem
    if digest.hexdigest() != expected_digest:
        raise _refused(file, "its data was changed: the SHA-256 is not the recorded one")
    tokens = [int(token) for token in arrays.pop(TOKENS)]
    try:
        require_in_vocabulary(tokens, vocabulary)
    except PromptError as problem:
        raise _refused(file, problem.what) from problem
    return SavedCache(tokens, arrays)


def read_fact(file: Path, name: str) -> str | None:
    """What a file says of itself under one name of its key, unchecked: to choose the key it is read with.

    Raises:
        EngineError: the file is missing, or no saved cache.
    """
    require_regular(file, EngineError, AGAIN)
    try:
        with file.open("rb") as stream:
            _, header = _header(file, stream, os.fstat(stream.fileno()).st_size)
    except OSError as problem:
        raise unreadable(problem, file, EngineError, AGAIN) from problem
    metadata = header.get("__metadata__")
    value = metadata.get(f"key.{name}") if isinstance(metadata, dict) else None
    return value if isinstance(value, str) else None


def _header(file: Path, stream: BinaryIO, size: int) -> tuple[int, dict[str, object]]:
    """The header, and how many bytes it takes."""
    length = int.from_bytes(stream.read(8), "little")
    if length > min(HEADER_LIMIT, size - 8):
        raise _refused(file, "it is no saved cache, or was cut short")
    header = parse_json(stream.read(length), where=file, error=EngineError, remedy=AGAIN)
    if not isinstance(header, dict):
        raise _refused(file, "its header holds no JSON object")
    return length, header


def _metadata(key: Mapping[str, str], digest: str) -> dict[str, str]:
    return {"format": FORMAT, "sha256": digest, **{f"key.{name}": value for name, value in key.items()}}


def _require_key(file: Path, metadata: object, key: Mapping[str, str]) -> str:
    """The SHA-256 of the data, once format and key are the expected ones."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise _refused(file, "it is no saved cache, or of another version's format")
    digest = metadata.get("sha256")
    expected = _metadata(key, str(digest))
    for name in sorted(expected.keys() | metadata.keys()):
        if name != "sha256" and metadata.get(name) != expected.get(name):
            subject = name.removeprefix("key.")
            there, here = metadata.get(name, "nothing"), expected.get(name, "nothing")
            raise _refused(file, f"it was saved under another {subject}: {there!r}, and here it is {here!r}")
    return str(digest)


def _token_count(file: Path, entry: object, capacity: int) -> int:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 1:
        raise _refused(file, "its header does not say how many tokens it has")
    if shape[0] > capacity:
        raise EngineError(
            f"the saved cache has {shape[0]:,} tokens, more than the {capacity:,} that are asked for",
            where=file,
            remedy="Ask for a sequence of a larger capacity",
        )
    return shape[0]


def _entries(parts: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[str, dict[str, Any]]:
    """The header's entries of tensors that lie one behind the other."""
    entries: dict[str, dict[str, Any]] = {}
    start = 0
    for name, (dtype, shape) in parts.items():
        kind, width = _TYPES[dtype]
        stop = start + prod(shape) * width
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    return entries


def _require_entries(file: Path, header: Mapping[str, object], expected: Mapping[str, dict[str, Any]]) -> int:
    """Bytes of the data, once the header describes exactly the model's tensors."""
    for name in (*expected, *(other for other in header if other not in expected)):
        if name != "__metadata__" and header.get(name) != expected.get(name):
            raise _refused(file, f"tensor {name} is not described as this model's: {header.get(name)}")
    return max(int(entry["data_offsets"][1]) for entry in expected.values())


def _bytes(array: NDArray[Any]) -> memoryview:
    """Of a contiguous array its own memory, of another a copy's."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _refused(file: Path, what: str) -> EngineError:
    return EngineError(f"the saved cache cannot be used: {what}", where=file, remedy=AGAIN)
