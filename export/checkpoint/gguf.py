"""A GGUF file as a Checkpoint.

The header is parsed here: `gguf.GGUFReader` builds several NumPy arrays for every token and merge (2 s and 150 MB for a
vocabulary of 49,152) and maps the file. Blocks are dequantized by the gguf package, which is also the reference in the
tests. Format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from edgephi.errors import SourceError, UnsupportedModelError, WeightError
from edgephi.export.checkpoint.config import shown
from edgephi.export.checkpoint.gguf_names import (
    config_from_metadata,
    hugging_face_name,
    interleaved_head_dim,
    split_qkv,
)
from edgephi.export.checkpoint.gguf_rope import FACTOR_TENSORS
from edgephi.export.checkpoint.safetensors import check_places
from edgephi.export.checkpoint.tensors import PLAIN_TYPES, gguf_block, read_rows, stored_bytes
from edgephi.export.spec import Checkpoint, TensorRef
from edgephi.files import refuse_lfs_pointer, require_regular, unreadable

MAGIC = b"GGUF"
HEADER_LIMIT = 64 * 2**20
"""Bytes. A vocabulary of 200,000 tokens with its merges takes 12 MB."""
MAX_ITEMS = 2_000_000
"""Of all arrays together: 1.3 million in the largest vocabularies. As Python values they take about 0.2 GB."""
MAX_ENTRIES = 100_000
"""Tensors, or keys."""
LONGEST_NAME = 512
MAX_FACTORS = 512
AGAIN = "Download the file again; it is damaged or cut short"

READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_UNREAD = re.compile(r"blk\.\d{1,4}\.attn_rot_embd(\.weight)?")
"""What old converters stored besides, and llama.cpp skips: gguf-py/gguf/constants.py, MODEL_TENSOR_SKIP."""
_RETIRED = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}  # fmt: skip
"""Types that llama.cpp no longer reads: ggml-org/ggml, include/ggml.h."""


class _PastTheEndError(SourceError):
    """The header goes on behind the bytes that were read."""


@dataclass
class _Cursor:
    """Bytes of the header and a position in them; every read is checked against the end."""

    data: memoryview
    file: Path
    at: int = 0
    items: int = 0
    """In the arrays so far."""

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise _PastTheEndError("the GGUF header runs past the end of the file", where=self.file, remedy=AGAIN)
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0])

    def text(self) -> str:
        # a vocabulary has 100,000 of them: no calls that can be spared
        start = self.at + 8
        if start > len(self.data):
            self.take(8)
        end = start + int.from_bytes(self.data[self.at : start], "little")
        if end > len(self.data):
            self.take(end - self.at)
        self.at = end
        try:
            return str(self.data[start:end], "utf-8")
        except UnicodeDecodeError as error:
            raise SourceError("a text in the GGUF header is no UTF-8", where=self.file, remedy=AGAIN) from error

    def value(self, kind: int) -> object:
        if kind in _SCALARS:
            code = "<" + _SCALARS[kind]
            scalar: object = struct.unpack(code, self.take(struct.calcsize(code)))[0]
            return scalar
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise SourceError(f"the GGUF header holds a value of unknown type {kind}", where=self.file, remedy=AGAIN)
        item, count = self.number("I"), self.number("Q")
        self.items += count
        if self.items > MAX_ITEMS and count <= len(self.data) - self.at:
            what = f"arrays in the GGUF header have more than the {MAX_ITEMS:,} values that are possible"
            raise SourceError(what, where=self.file, remedy=AGAIN)
        if item in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[item])
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * size)))
        if count > len(self.data) - self.at:
            raise _PastTheEndError("an array in the GGUF header is longer than the file", where=self.file, remedy=AGAIN)
        if item != _STRING:  # arrays of arrays too: llama.cpp does not read them either
            raise SourceError(f"the GGUF header holds an array of type {item}", where=self.file, remedy=AGAIN)
        return [self.text() for _ in range(count)]


def read_gguf_header(file: Path) -> tuple[dict[str, object], list[TensorRef]]:
    """Metadata and tensors of a GGUF file, under its own names; shapes in row-major order.

    Raises:
        SourceError: not GGUF, another version or byte order, cut short, too large, a key or tensor that stands twice,
            tensors that overlap.
        WeightError: a tensor type edgephi does not read.
    """
    require_regular(file, SourceError, AGAIN)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(min(size, 16 * 2**20))
            refuse_lfs_pointer(head[:64], file, SourceError)
            try:
                return _parse(_Cursor(memoryview(head), file), size)
            except _PastTheEndError:
                if size <= len(head):
                    raise
            head += stream.read(min(size, HEADER_LIMIT) - len(head))
    except OSError as problem:
        raise unreadable(problem, file, SourceError, AGAIN) from problem
    try:
        return _parse(_Cursor(memoryview(head), file), size)
    except _PastTheEndError as problem:
        if size <= HEADER_LIMIT:
            raise
        what = f"the GGUF header has more than the {HEADER_LIMIT:,} bytes that are possible"
        raise SourceError(what, where=file, remedy=AGAIN) from problem


def _parse(cursor: _Cursor, size: int) -> tuple[dict[str, object], list[TensorRef]]:
    file = cursor.file
    tensor_count, value_count = _counts(cursor)
    metadata: dict[str, object] = {}
    for _ in range(value_count):
        key = cursor.text()
        if key in metadata or len(key) > LONGEST_NAME:
            what = f"the key {key[:80]} stands twice in the GGUF header, or is too long"
            raise SourceError(what, where=file, remedy=AGAIN)
        metadata[key] = cursor.value(cursor.number("I"))
    entries = []
    for _ in range(tensor_count):
        name, dims = cursor.text(), cursor.number("I")
        if not 1 <= dims <= 4 or len(name) > LONGEST_NAME:
            raise SourceError(f"tensor {name[:80]} has {dims} dimensions, or a long name", where=file, remedy=AGAIN)
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
        entries.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment & (alignment - 1):
        raise SourceError(f"general.alignment is {shown(alignment)}", where=file, remedy=AGAIN)
    data = -(-cursor.at // alignment) * alignment
    refs = [_tensor(file, size, data, *entry) for entry in entries]
    for ref in refs:
        if (ref.offset - data) % alignment:
            raise SourceError(
                f"tensor {ref.name} begins between two multiples of {alignment}", where=file, remedy=AGAIN
            )
    check_places(file, size, data, refs)
    return metadata, refs


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Tensors and keys of the file, from its first 24 bytes."""
    file = cursor.file
    if bytes(cursor.take(4)) != MAGIC:
        raise SourceError("the file is no GGUF file", where=file, remedy="Name a .gguf file or a checkpoint folder")
    version = cursor.number("I")
    if version not in (2, 3):
        what = f"the file is GGUF version {version}"
        if version and version % 65536 == 0:
            what = "the file is GGUF in big-endian byte order"
        raise SourceError(what, where=file, remedy="Convert it to version 3, little-endian")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    if max(tensor_count, value_count) > MAX_ENTRIES:
        what = f"the GGUF header counts {tensor_count:,} tensors and {value_count:,} keys: {MAX_ENTRIES:,} are possible"
        raise SourceError(what, where=file, remedy=AGAIN)
    return tensor_count, value_count


def _tensor(file: Path, size: int, data: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorRef:
    import gguf

    if kind in _RETIRED:
        raise WeightError(
            f"tensor {name} is stored as {_RETIRED[kind]}, a type that llama.cpp has given up",
            where=file,
            remedy="Take the Q4_0 file of the same model, or make one from the original weights with llama.cpp",
        )
    try:
        storage = gguf.GGMLQuantizationType(kind).name
    except ValueError:
        storage = f"type {kind}"
    if storage not in READABLE:
        raise WeightError(
            f"tensor {name} is stored as {storage}", where=file, remedy=f"Use a file in {', '.join(READABLE)}"
        )
    if storage not in PLAIN_TYPES and len(shape) == 1:
        plain = ", ".join(each for each in READABLE if each in PLAIN_TYPES)
        raise WeightError(
            f"tensor {name} is a vector stored as {storage}, and vectors are read in {plain}",
            where=file,
            remedy="Convert the model again with a current llama.cpp, which keeps norms and biases in F32",
        )
    if storage not in PLAIN_TYPES and shape[-1] % gguf_block(storage)[0]:
        raise WeightError(
            f"tensor {name} has rows of {shape[-1]} values, no multiple of its block", where=file, remedy=AGAIN
        )
    length = stored_bytes(storage, shape)
    if data + offset + length > size:
        raise SourceError(
            f"the file has {size:,} bytes; tensor {name} ends at {data + offset + length:,}", where=file, remedy=AGAIN
        )
    return TensorRef(name, file, data + offset, length, shape, storage)


def open_gguf(file: Path) -> Checkpoint:
    """Describe the model in a GGUF file, its tensors under Hugging Face names and in Hugging Face row order.

    Raises:
        SourceError, WeightError: see `read_gguf_header`.
        UnsupportedModelError: an architecture, or a tensor, edgephi does not know.
    """
    metadata, tensors = read_gguf_header(file)
    if metadata.get("general.type") == "adapter" or any(ref.name.endswith((".lora_a", ".lora_b")) for ref in tensors):
        raise UnsupportedModelError(
            "the file is an adapter (LoRA), not a whole model",
            where=file,
            remedy="Merge it into its base model first (llama-export-lora), and name the result",
        )
    if "split.count" in metadata and metadata["split.count"] not in (0, 1):
        raise UnsupportedModelError(
            "the model is split over several GGUF files",
            where=file,
            remedy="Merge them first (llama-gguf-split --merge)",
        )
    shapes = {ref.name: ref.shape for ref in tensors}
    if len(shapes) < len(tensors):
        raise SourceError("two tensors have the same name", where=file, remedy=AGAIN)
    factors = {ref.name: _factors(ref) for ref in tensors if ref.name in FACTOR_TENSORS}
    config = config_from_metadata(metadata, shapes, factors, str(file))
    weights = [ref for ref in tensors if ref.name not in FACTOR_TENSORS and not _UNREAD.fullmatch(ref.name)]
    renamed = {}
    for ref in (part for tensor in weights for part in split_qkv(tensor, config)):
        name = hugging_face_name(ref.name, str(config["model_type"]), str(file))
        renamed[name] = TensorRef(
            name, ref.file, ref.offset, ref.bytes, ref.shape, ref.storage, interleaved_head_dim(name, config)
        )
    return Checkpoint(
        kind="gguf",
        name=file.name,
        revision=None,
        config=config,
        config_where=str(file),
        tensors=renamed,
        files=(file,),
        folder=None,
        gguf_metadata=metadata,
    )


def _factors(ref: TensorRef) -> list[float]:
    if len(ref.shape) != 1 or ref.shape[0] > MAX_FACTORS or ref.storage not in PLAIN_TYPES:
        what = f"tensor {ref.name} has shape {list(ref.shape)} and type {ref.storage}"
        raise SourceError(what, where=ref.file, remedy=AGAIN)
    return [float(x) for x in read_rows(ref, 0, ref.shape[0])]
