"""`model.onnx.data` while it is written, and the journal that lets an interrupted export continue."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import OutputError
from edgephi.export.storage import StoredTensor

JOURNAL = "export.journal"


def write_refusal(error: OSError, where: Path) -> OutputError:
    """The disk is full, or the folder went away."""
    return OutputError(
        f"the output could not be written: {error.strerror or error}",
        where=where,
        remedy="Free disk space or choose another --output, then run the same command again",
    )


class DataFile:
    """Tensors at their offsets, from several threads; what was written before stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._stream: BinaryIO = path.open("r+b" if path.exists() else "w+b", buffering=0)

    def write(self, tensor: StoredTensor, first_row: int, values: NDArray[np.generic]) -> None:
        """Write consecutive rows of a tensor, in the tensor's dtype.

        Raises:
            OutputError: the disk is full.
        """
        rows = np.ascontiguousarray(values)
        offset = tensor.offset + first_row * (tensor.bytes // tensor.shape[0])
        view = rows.view(np.uint8).reshape(-1).data
        try:
            with self._lock:
                self._stream.seek(offset)
                while view:
                    view = view[self._stream.write(view) :]
        except OSError as error:
            raise write_refusal(error, self._path) from error

    def read(self, tensor: StoredTensor) -> NDArray[np.generic]:
        """A whole tensor that was written before."""
        raw = bytearray(tensor.bytes)
        view = memoryview(raw)
        with self._lock:
            self._stream.seek(tensor.offset)
            while view:
                count = self._stream.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise OutputError(
                        f"the unfinished export ends inside {tensor.name}",
                        where=self._path,
                        remedy="Delete the folder it lies in, then run the same command again",
                    )
                view = view[count:]
        return np.frombuffer(raw, tensor.dtype).reshape(tensor.shape)

    def close(self) -> None:
        self._stream.close()


def boot_identity() -> str:
    """Changes when the machine restarts: what was written before may then not have reached the disk."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    if boot_id.is_file():
        return boot_id.read_text(encoding="ascii").strip()
    import psutil

    return f"{psutil.boot_time():.0f}"


class Journal:
    """Which groups of weights (a layer, the embedding, the head) are in the data file, whole.

    The first line is a key of everything that decides the bytes (arguments, source files, layout) and of the machine's
    current start. A journal with another key, or none, means starting anew. Written bytes survive the death of the
    process, not that of the machine; to survive that too they would have to be forced to the disk after every layer,
    which cost more than the export itself (SmolLM2 on a busy disk: 12 s instead of 4).
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._lock = Lock()
        first = f"{key} {boot_identity()}"
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        self.continues = lines[:1] == [first]
        # a line without its line break was cut off by the interruption
        self.done = frozenset(lines[1:-1]) if self.continues else frozenset[str]()
        if not self.continues:
            path.write_text(f"{first}\n", encoding="utf-8", newline="\n")

    def add(self, group: str) -> None:
        """Record a group, after its last byte was written."""
        try:
            with self._lock, self._path.open("a", encoding="utf-8", newline="\n") as stream:
                stream.write(f"{group}\n")
        except OSError as error:
            raise write_refusal(error, self._path) from error
