"""Weights flow from the checkpoint into the data file: read a slice, quantize it, write it to its place, forget it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import OutputError, WeightError
from edgephi.export.read import read_rows, read_vector, require_finite, weight_slices
from edgephi.export.rope import rope_table
from edgephi.export.spec import Architecture, TensorRef, Weight
from edgephi.export.storage import DType, Layout, StoredMatrix, StoredTensor
from edgephi.quantize import QuantizedWeight, round_to_nearest

VALUES_PER_SLICE = 2 * 2**20
"""8 MB of float32: several cache sizes, so that reads stay long, and small beside the interpreter's own 100 MB."""

ROPE_ROWS = 4096

Report = Callable[[int], None]


class DataFile:
    """`model.onnx.data` while it is written: tensors at their offsets, from several threads."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._lock = Lock()
        self._stream: BinaryIO = path.open("wb", buffering=0)
        try:
            self._stream.truncate(size)
        except OSError as error:
            self.close()
            raise self._refusal(error) from error

    def write(self, tensor: StoredTensor, first_row: int, values: NDArray[np.generic]) -> None:
        """Write consecutive rows of a tensor, in the tensor's dtype."""
        rows = np.ascontiguousarray(values)
        offset = tensor.offset + first_row * (tensor.bytes // tensor.shape[0])
        view = rows.view(np.uint8).reshape(-1).data
        try:
            with self._lock:
                self._stream.seek(offset)
                while view:
                    view = view[self._stream.write(view) :]
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        self._stream.close()

    def _refusal(self, error: OSError) -> OutputError:
        return OutputError(
            f"the weights could not be written: {os.strerror(error.errno or 0)}",
            where=self._path,
            remedy="Free disk space or choose another --output, then run the same command again",
        )


@dataclass(frozen=True)
class _Slice:
    weight: Weight
    row: int
    tensor: TensorRef
    start: int
    stop: int

    @property
    def source_bytes(self) -> int:
        return self.tensor.bytes * (self.stop - self.start) // self.tensor.shape[0]


def pack_weights(architecture: Architecture, layout: Layout, path: Path, threads: int, report: Report) -> None:
    """Fill the data file. `report` is told the source bytes of every finished slice.

    Raises:
        WeightError: NaN or infinite values, naming tensor and file.
        OutputError: the disk is full.
        SourceError: a file ends early.
    """
    data = DataFile(path, layout.bytes)
    try:
        _write_vectors(architecture, layout, data, report)
        _write_rope(architecture, layout, data)
        slices = list(_matrix_slices(architecture))
        with ThreadPoolExecutor(threads, thread_name_prefix="edgephi-pack") as pool:
            jobs = [pool.submit(_pack_slice, job, layout.matrices[job.weight.name], data, report) for job in slices]
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in jobs:
                job.cancel()
        for job in done:
            job.result()
    finally:
        data.close()


def source_bytes(architecture: Architecture) -> int:
    """Bytes `pack_weights` will report in all."""
    return sum(
        part.tensor.bytes * (part.stop - part.start) // part.tensor.shape[0]
        for weight in architecture.weights.values()
        for part in weight.parts
    )


def _matrix_slices(architecture: Architecture) -> Iterator[_Slice]:
    for weight in architecture.weights.values():
        if weight.role != "vector":
            for row, tensor, start, stop in weight_slices(weight, VALUES_PER_SLICE):
                yield _Slice(weight, row, tensor, start, stop)


def _pack_slice(job: _Slice, matrix: StoredMatrix, data: DataFile, report: Report) -> None:
    values = read_rows(job.tensor, job.start, job.stop)
    if matrix.format is None:
        require_finite(values, job.tensor)
        data.write(matrix.codes, job.row, _as(values, matrix.codes.dtype, job.tensor))
    else:
        try:
            packed = round_to_nearest(values, matrix.format, name=job.tensor.name)
        except WeightError as error:
            raise WeightError(
                error.what, where=f"{job.tensor.name} in {job.tensor.file}", remedy=error.remedy
            ) from error
        _write_quantized(packed, matrix, job.row, data)
    report(job.source_bytes)


def _write_quantized(packed: QuantizedWeight, matrix: StoredMatrix, row: int, data: DataFile) -> None:
    data.write(matrix.codes, row, packed.codes)
    if matrix.scales is not None:
        data.write(matrix.scales, row, packed.scales)
    if matrix.zero_points is not None and packed.zero_points is not None:
        data.write(matrix.zero_points, row, packed.zero_points)


def _as(values: NDArray[np.float32], dtype: DType, tensor: TensorRef) -> NDArray[np.generic]:
    if dtype == "float32":
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise WeightError(
            f"tensor {tensor.name} holds values beyond float16's 65504",
            where=tensor.file,
            remedy="Export with --precision int4, int8 or fp32",
        )
    return half


def _write_vectors(architecture: Architecture, layout: Layout, data: DataFile, report: Report) -> None:
    for name, stored in layout.vectors.items():
        weight = architecture.weights.get(name)
        if weight is not None:
            data.write(stored, 0, _as(read_vector(weight), stored.dtype, weight.parts[0].tensor))
            report(sum(part.tensor.bytes for part in weight.parts))


def _write_rope(architecture: Architecture, layout: Layout, data: DataFile) -> None:
    cos_cache, sin_cache = layout.vectors["cos_cache"], layout.vectors["sin_cache"]
    dtype = np.float32 if cos_cache.dtype == "float32" else np.float16
    for start in range(0, cos_cache.shape[0], ROPE_ROWS):
        cos, sin = rope_table(architecture.spec.rope, start, min(start + ROPE_ROWS, cos_cache.shape[0]))
        data.write(cos_cache, start, cos.astype(dtype))
        data.write(sin_cache, start, sin.astype(dtype))
