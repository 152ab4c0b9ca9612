"""A LoRA adapter in onnxruntime's format, read without onnxruntime, whose reader is native code for files one trusts.

The file is a FlatBuffer: a table of parameters, each a name, dimensions, a type and bytes. Behind it, where onnxruntime
does not look, edgephi writes a footer that says which base the adapter is for: JSON, its length in 8 bytes and `MAGIC`.

Sources: microsoft/onnxruntime, onnxruntime/lora/adapter_format/adapter_schema.fbs; google/flatbuffers, "FlatBuffers
Internals".
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from edgephi.errors import AdapterError
from edgephi.files import parse_json, read_file
from edgephi.records import Sha256, Strict, first_problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgephi.manifest import LoraFacts

ENDING = ".onnx_adapter"
MAGIC = b"EDGEPHIA"
FILE_LIMIT = 2**31 - 1
"""Bytes; offsets of a FlatBuffer have no more."""
FOOTER_LIMIT = 2**16
MOST_PARAMETERS = 100_000
LONGEST_NAME = 512
LORA_ENDINGS = (".lora_A.weight", ".lora_B.weight")
AGAIN = "Make it again with `edgephi adapter convert`"
_TYPES = {1: "float32", 10: "float16"}
"""onnx.TensorProto.DataType"""


class AdapterFooter(Strict):
    """What the file says of itself."""

    format: int = Field(default=1, ge=1, le=1)
    base: Sha256 = Field(description="as `LoraFacts.base`: the sizes and weights that it was made for")
    base_name: str = Field(max_length=500, description="the bundle's source, for people")
    trained_on: str | None = Field(max_length=500, description="base_model_name_or_path of the adapter's training")
    rank: int = Field(ge=1, le=2**20, description="the largest of a module")
    modules: int = Field(ge=1, le=2**20, description="of the model that it updates")


@dataclass(frozen=True)
class AdapterFile:
    """A file whose every offset was followed and checked; the values are views of its bytes."""

    footer: AdapterFooter | None
    """None: another tool wrote the file."""
    tensors: Mapping[str, NDArray[Any]]
    """By name, float32 or float16."""
    sha256: str


def lora_names(layer: int, product: str) -> tuple[str, str]:
    """The graph's inputs A and B behind a product of a layer."""
    base = f"model.layers.{layer}.{product}"
    return base + LORA_ENDINGS[0], base + LORA_ENDINGS[1]


def with_footer(data: bytes, footer: AdapterFooter) -> bytes:
    """An adapter as onnxruntime writes it, and what edgephi adds."""
    text = footer.model_dump_json().encode()
    return data + text + len(text).to_bytes(8, "little") + MAGIC


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter.

    Raises:
        AdapterError: it is missing, no adapter, damaged, or holds values of other types or that are not finite.
    """
    data = read_file(path, limit=FILE_LIMIT, error=AdapterError, remedy=AGAIN)
    try:
        footer, end = _footer(data, path)
        tensors = _Reader(data, end).tensors()
    except _Damaged as problem:
        raise AdapterError(f"the file is no adapter that can be used: {problem}", where=path, remedy=AGAIN) from None
    return AdapterFile(footer, tensors, hashlib.sha256(data).hexdigest())


def require_fitting(adapter: AdapterFile, facts: LoraFacts | None, layers: int, dtype: str, where: Path) -> None:
    """Compare an adapter with what a bundle's graph takes.

    Args:
        layers: of the model.
        dtype: of the graph's inputs.

    Raises:
        AdapterError: the bundle takes none; the adapter is of another base, has a tensor the graph has no input for, or
            one of another type, shape or a larger rank.
    """
    facts = require_lora(facts, where)
    if adapter.footer is None:
        raise AdapterError(
            "the adapter does not say which base it is for: another tool wrote it",
            where=where,
            remedy="Make it with `edgephi adapter convert` from the folder that PEFT saved",
        )
    if adapter.footer.base != facts.base:
        raise AdapterError(
            f"the adapter is for another base: {adapter.footer.base_name}",
            where=where,
            remedy="Convert the adapter with --bundle naming this bundle, if it was trained on this bundle's source",
        )
    targets = {target.product: target for target in facts.targets}
    wanted = {lora_names(layer, product): targets[product] for layer in range(layers) for product in targets}
    if unknown := set(adapter.tensors) - {name for pair in wanted for name in pair}:
        raise AdapterError(
            f"the bundle has no input for the adapter's {min(unknown)}",
            where=where,
            remedy="Export the model again with --lora-layers all, or convert the adapter for this bundle",
        )
    for (a, b), target in wanted.items():
        shapes = [adapter.tensors[name].shape for name in (a, b) if name in adapter.tensors]
        if not shapes:
            continue
        rank = shapes[0][-1] if shapes[0] else 0
        if shapes != [(target.inputs, rank), (rank, target.outputs)]:
            raise AdapterError(f"{a} and its partner have the shapes {shapes}", where=where, remedy=AGAIN)
        if rank > target.largest_rank:
            raise AdapterError(
                f"{a} has rank {rank}, and the bundle takes up to {target.largest_rank}",
                where=where,
                remedy="Export the model again with a larger --lora",
            )
        if {str(adapter.tensors[name].dtype) for name in (a, b)} != {dtype}:
            raise AdapterError(
                f"{a} or its partner is not {dtype}, which the bundle's graph computes in", where=where, remedy=AGAIN
            )


def require_lora(facts: LoraFacts | None, where: object) -> LoraFacts:
    """Raises AdapterError for a bundle whose graph takes no adapters."""
    if facts is None:
        raise AdapterError(
            "this bundle takes no adapters",
            where=where,
            remedy="Export the model again with --lora RANK, a rank as large as the adapter's",
        )
    return facts


class _Damaged(ValueError):
    """What is wrong with the bytes; not for callers."""


def _footer(data: bytes, path: Path) -> tuple[AdapterFooter | None, int]:
    """What the file says of itself, and where the FlatBuffer ends."""
    if not data.endswith(MAGIC):
        return None, len(data)
    length = int.from_bytes(data[-16:-8], "little")
    if length > min(FOOTER_LIMIT, len(data) - 16):
        raise _Damaged("its footer is cut short")
    start = len(data) - 16 - length
    text = data[start:-16]
    parse_json(text, where=path, error=AdapterError, remedy=AGAIN)
    try:
        return AdapterFooter.model_validate_json(text, strict=True), start
    except ValidationError as problem:
        raise _Damaged(f"its footer: {first_problem(problem)}") from None


class _Reader:
    """A FlatBuffer of one adapter; nothing outside of `data[:end]` is read, and no offset is believed."""

    def __init__(self, data: bytes, end: int) -> None:
        self._data, self._end = data, end

    def tensors(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        if self._data[4:8] != b"TORT":
            raise _Damaged("it does not begin as onnxruntime's adapters do")
        root = self._fields(self._number("I", 0))
        if (version := self._int32(root, 0)) != 1:
            raise _Damaged(f"its format is {version}, and 1 is read")
        tensors: dict[str, NDArray[Any]] = {}
        taken = 0
        start, count = self._vector(root, 3, 4)
        if count > MOST_PARAMETERS:
            raise _Damaged(f"it has {count:,} parameters")
        for place in range(start, start + 4 * count, 4):
            fields = self._fields(place + self._number("I", place))
            name = self._name(fields)
            at, dimensions = self._vector(fields, 1, 8)
            if not 1 <= dimensions <= 8:
                raise _Damaged(f"{name} has {dimensions} dimensions")
            shape = struct.unpack_from(f"<{dimensions}q", self._data, at)
            kind = _TYPES.get(self._int32(fields, 2))
            if kind is None:
                raise _Damaged(f"{name} is neither float32 nor float16")
            at, length = self._vector(fields, 3, 1)
            if min(shape) < 1 or prod(shape) * np.dtype(kind).itemsize != length:
                raise _Damaged(f"{name} of shape {list(shape)} has {length:,} bytes")
            taken += length
            if name in tensors or taken > self._end:  # parameters may name the same bytes again and again
                raise _Damaged(f"{name} is there twice, or bytes are")
            values = np.frombuffer(self._data, np.dtype(kind).newbyteorder("<"), prod(shape), at).reshape(shape)
            if not np.isfinite(values).all():
                raise _Damaged(f"{name} holds values that are not finite")
            tensors[name] = values
        if not tensors:
            raise _Damaged("it has no parameters")
        return tensors

    def _number(self, code: str, at: int) -> int:
        size = struct.calcsize(f"<{code}")
        if not 0 <= at <= self._end - size:
            raise _Damaged("an offset leads out of it")
        return int(struct.unpack_from(f"<{code}", self._data, at)[0])

    def _fields(self, table: int) -> dict[int, int]:
        """Places of a table's fields, by number."""
        virtual = table - self._number("i", table)
        size = self._number("H", virtual)
        if size < 4 or size % 2:
            raise _Damaged("a table is malformed")
        offsets = {index: self._number("H", virtual + 4 + 2 * index) for index in range(min(8, (size - 4) // 2))}
        return {index: table + offset for index, offset in offsets.items() if offset}

    def _int32(self, fields: Mapping[int, int], index: int) -> int:
        return self._number("i", fields[index]) if index in fields else 0

    def _vector(self, fields: Mapping[int, int], index: int, width: int) -> tuple[int, int]:
        """Where a vector's items begin, and how many there are; all of them lie in the file."""
        if index not in fields:
            return 0, 0
        at = fields[index] + self._number("I", fields[index])
        count = self._number("I", at)
        if count > (self._end - at - 4) // width:
            raise _Damaged("a list runs past its end")
        return at + 4, count

    def _name(self, fields: Mapping[int, int]) -> str:
        at, length = self._vector(fields, 0, 1)
        if not 1 <= length <= LONGEST_NAME:
            raise _Damaged("a parameter has no name, or a long one")
        try:
            return self._data[at : at + length].decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged("a name is no UTF-8") from None
