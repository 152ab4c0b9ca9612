"""`model.onnx.data` while it is written; what a journal says of it is compared with the bytes that are there."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import OutputError
from edgephi.export.journal import Piece, Vouched, write_refusal
from edgephi.export.weights.layout import Layout, StoredTensor

READ_AT_ONCE = 4 * 2**20


class DataFile:
    """Tensors at their offsets, from several threads; what was written before stays."""

    def __init__(self, path: Path, *, hashed: bool = True) -> None:
        """Open or make the file.

        Args:
            hashed: keep a hash of what is written, for a journal.

        Raises:
            OutputError: it cannot be made.
        """
        self._path = path
        self._lock = Lock()
        self._pieces: dict[int, Piece] | None = {} if hashed else None
        try:
            self._stream: BinaryIO = path.open("r+b" if path.exists() else "w+b", buffering=0)
        except OSError as error:
            raise write_refusal(error, path) from error

    def write(self, tensor: StoredTensor, first_row: int, values: NDArray[np.generic]) -> None:
        """Write consecutive rows of a tensor, in the tensor's dtype.

        Raises:
            OutputError: the disk is full.
        """
        rows = np.ascontiguousarray(values)
        offset = tensor.offset + first_row * (tensor.bytes // tensor.shape[0])
        view = rows.view(np.uint8).reshape(-1).data
        # here the bytes are in the processor's cache still, and threads hash side by side
        piece = (offset, len(view), hashlib.sha256(view).hexdigest()) if self._pieces is not None else None
        self._write(offset, view)
        if self._pieces is not None and piece is not None:
            with self._lock:
                self._pieces[offset] = piece

    def _write(self, offset: int, view: memoryview) -> None:
        try:
            with self._lock:
                self._stream.seek(offset)
                while view:
                    view = view[self._stream.write(view) :]
        except OSError as error:
            raise write_refusal(error, self._path) from error

    def written(self, tensors: Iterable[StoredTensor]) -> list[Piece]:
        """The pieces in which tensors were written, for `Journal.add`; each is given out once."""
        assert self._pieces is not None
        found: list[Piece] = []
        with self._lock:
            offsets = sorted(self._pieces)
            for tensor in tensors:
                first, last = (bisect_left(offsets, at) for at in (tensor.offset, tensor.offset + tensor.bytes))
                found += [self._pieces.pop(offset) for offset in offsets[first:last] if offset in self._pieces]
        return sorted(found)

    def holds(self, tensors: Iterable[StoredTensor], vouched: Vouched | None) -> bool:
        """Whether these pieces are what tensors consist of, all of it, and the file has these very bytes."""
        if vouched is None or isinstance(vouched, Mapping):
            return False
        pieces = sorted(vouched)
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            at = tensor.offset
            while at < tensor.offset + tensor.bytes:
                if not pieces or pieces[0][0] != at or pieces[0][1] < 1:
                    return False
                at += pieces.pop(0)[1]
            if at != tensor.offset + tensor.bytes:
                return False
        return not pieces and all(self._sha256(offset, length) == sha256 for offset, length, sha256 in vouched)

    def _sha256(self, offset: int, length: int) -> str | None:
        """None: the file ends before."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(length, READ_AT_ONCE)))
        while length:
            part = buffer[: min(length, len(buffer))]
            if not self._read(offset, part):
                return None
            digest.update(part)
            offset, length = offset + len(part), length - len(part)
        return digest.hexdigest()

    def _read(self, offset: int, view: memoryview) -> bool:
        """Fill the view; False: the file ends before."""
        with self._lock:
            self._stream.seek(offset)
            while view:
                count = self._stream.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    return False
                view = view[count:]
        return True

    def read(self, tensor: StoredTensor) -> NDArray[np.generic]:
        """A whole tensor that was written before."""
        raw = bytearray(tensor.bytes)
        if not self._read(tensor.offset, memoryview(raw)):
            raise OutputError(
                f"the unfinished export ends inside {tensor.name}",
                where=self._path,
                remedy="Delete the folder it lies in, then run the same command again",
            )
        return np.frombuffer(raw, tensor.dtype).reshape(tensor.shape)

    def clear_gaps(self, layout: Layout) -> None:
        """Zeros between the tensors and nothing behind the last one, whatever an interrupted export left there.

        Raises:
            OutputError: the file cannot be written.
        """
        at = 0
        for tensor in sorted(layout.tensors(), key=lambda tensor: tensor.offset):
            if tensor.offset > at:
                self._write(at, memoryview(bytes(tensor.offset - at)))
            at = max(at, tensor.offset + tensor.bytes)
        try:
            with self._lock:
                if self._stream.seek(0, os.SEEK_END) > at:
                    self._stream.truncate(at)
        except OSError as error:
            raise write_refusal(error, self._path) from error

    def close(self) -> None:
        self._stream.close()
