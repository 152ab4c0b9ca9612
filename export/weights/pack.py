"""Weights flow from the checkpoint into the data file: read a slice, quantize it, write it to its place, forget it.

Weights whose quantizer needs inputs are not written here: `export/calibrate/fit.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import WeightError
from edgephi.export.checkpoint.tensors import require_finite, weight_slices
from edgephi.export.families.rope import rope_table
from edgephi.export.journal import Journal
from edgephi.export.spec import Architecture, Rope, TensorRef, Weight
from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.half_range import require_half_vector, to_half
from edgephi.export.weights.layout import Layout, StoredMatrix, StoredTensor
from edgephi.export.weights.repack import repack
from edgephi.export.weights.rescaling import Treatment
from edgephi.export.weights.stored import write_stored
from edgephi.export.weights.transforms import mixes_rows, read_slice, read_weight
from edgephi.quantize.formats import QuantizedWeight
from edgephi.quantize.quantizer import Statistics, StoredWeight
from edgephi.quantize.registry import quantizer

VALUES_PER_SLICE = 2 * 2**20
"""8 MB of float32: several cache sizes, so that reads stay long, and small beside the interpreter's own 100 MB."""

ROPE_ROWS = 4096

Report = Callable[[int], None]


@dataclass(frozen=True)
class _Slice:
    """Rows `start` to `stop` of each tensor; of a weight whose rows are mixed, all of it."""

    weight: Weight
    row: int
    tensors: tuple[TensorRef, ...]
    start: int
    stop: int

    @property
    def group(self) -> str:
        """`layers.3` for all weights of a layer, else the weight's own name."""
        parts = self.weight.name.split(".")
        return ".".join(parts[:2]) if parts[0] == "layers" else self.weight.name

    @property
    def source_bytes(self) -> int:
        if mixes_rows(self.weight):
            return weight_source_bytes(self.weight)
        return sum(tensor.bytes * (self.stop - self.start) // tensor.shape[0] for tensor in self.tensors)


def pack_weights(
    architecture: Architecture,
    layout: Layout,
    path: Path,
    journal: Journal | None,
    threads: int,
    report: Report,
    treatments: Mapping[str, Treatment] | None = None,
) -> None:
    """Fill the data file, group by group; groups the journal holds, and whose bytes are still those, stay as they are.

    Args:
        journal: learns of every group (a layer, the embedding, the head) once it is written; None: nobody goes on from
            this file.
        report: told the source bytes of every finished slice, from the threads that finished them.
        treatments: what is done to weights before they are quantized, by name.

    Raises:
        WeightError: NaN or infinite values, naming tensor and file.
        OutputError: the disk is full.
        SourceError: a file ends early.
    """
    data, treated = DataFile(path, hashed=journal is not None), treatments or {}
    try:
        if journal is not None and journal.continues:
            data.clear_gaps(layout)
        _write_vectors(architecture, layout, data, report, treated)
        _write_rope(architecture, layout, data)
        progress = _Groups(architecture, layout, data, journal, threads)
        report(progress.bytes_before)
        with ThreadPoolExecutor(threads, thread_name_prefix="edgephi-pack") as pool:
            jobs = [
                pool.submit(_pack_slice, piece, layout, data, progress, report, treated.get(piece.weight.name))
                for piece in progress.pending
            ]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            finally:  # an error or Ctrl-C: leaving the pool must not mean finishing the rest
                for job in jobs:
                    job.cancel()
        for job in done:
            job.result()
    finally:
        data.close()


class _Groups:
    """Slices still to pack, in order, and how many of each group are missing."""

    def __init__(
        self, architecture: Architecture, layout: Layout, data: DataFile, journal: Journal | None, threads: int
    ) -> None:
        self._journal, self._data, self._lock = journal, data, Lock()
        self.whole_weight = Lock()
        slices = list(_matrix_slices(architecture))
        self._tensors: dict[str, dict[StoredTensor, None]] = {}
        for piece in slices:
            of_group = self._tensors.setdefault(piece.group, {})
            of_group.update(dict.fromkeys(layout.matrices[piece.weight.name].tensors))
        done = self._done(threads)
        self.pending = [piece for piece in slices if piece.group not in done]
        self.bytes_before = sum(piece.source_bytes for piece in slices if piece.group in done)
        self._missing = Counter(piece.group for piece in self.pending)

    def _done(self, threads: int) -> set[str]:
        """Groups whose bytes are those that the journal recorded."""
        if self._journal is None or not self._journal.done:
            return set()
        groups, vouched = list(self._tensors), self._journal.done
        with ThreadPoolExecutor(threads, thread_name_prefix="edgephi-check") as pool:
            held = pool.map(lambda group: self._data.holds(self._tensors[group], vouched.get(group)), groups)
        return {group for group, holds in zip(groups, held, strict=True) if holds}

    def finish(self, piece: _Slice) -> None:
        with self._lock:
            self._missing[piece.group] -= 1
            complete = not self._missing[piece.group]
        if complete and self._journal is not None:
            self._journal.add(piece.group, self._data.written(self._tensors[piece.group]))


def source_bytes(architecture: Architecture) -> int:
    """Bytes `pack_weights` will report in all."""
    return sum(weight_source_bytes(weight) for weight in architecture.weights.values())


def weight_source_bytes(weight: Weight) -> int:
    """Bytes of the checkpoint that a weight is read from."""
    return sum(part.tensor.bytes * (part.stop - part.start) // part.tensor.shape[0] for part in weight.parts)


def _matrix_slices(architecture: Architecture) -> Iterator[_Slice]:
    for weight in architecture.weights.values():
        if weight.role == "vector":
            continue
        if mixes_rows(weight):
            yield _Slice(weight, 0, tuple(part.tensor for part in weight.parts), 0, weight.shape[0])
        else:
            for row, tensors, start, stop in weight_slices(weight, VALUES_PER_SLICE):
                yield _Slice(weight, row, tensors, start, stop)


def _pack_slice(
    job: _Slice,
    layout: Layout,
    data: DataFile,
    progress: _Groups,
    report: Report,
    treatment: Treatment | None,
) -> None:
    statistics = None if treatment is None else Statistics(mean_squares=treatment.mean_squares)
    tensor, matrix, half = job.tensors[0], layout.matrices[job.weight.name], layout.half
    if matrix.repacked:
        write_stored(_repacked(job, matrix), matrix, job.row, data, tensor, half)
    else:
        # one weight that has to be read as a whole is in memory at a time, however many threads there are
        with progress.whole_weight if mixes_rows(job.weight) else nullcontext():
            for row, values in _values(job):
                treated = values if treatment is None else treatment.apply(values, row)
                _write_values(treated, matrix, row, data, tensor, half, statistics)
    progress.finish(job)
    report(job.source_bytes)


def _write_values(
    values: NDArray[np.float32],
    matrix: StoredMatrix,
    row: int,
    data: DataFile,
    tensor: TensorRef,
    half: str | None,
    statistics: Statistics | None,
) -> None:
    if matrix.format is None:
        require_finite(values, tensor)
        data.write(matrix.codes, row, to_half(values, matrix.codes.dtype, tensor))
    else:
        write_stored(_quantized(values, matrix, tensor, statistics), matrix, row, data, tensor, half)


def _values(job: _Slice) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The job's rows in pieces, and the first row of each piece."""
    if not mixes_rows(job.weight):
        yield job.row, read_slice(job.weight, job.tensors, job.start, job.stop)
        return
    values = read_weight(job.weight)
    step = max(1, VALUES_PER_SLICE // values.shape[1])
    for row in range(0, len(values), step):
        yield row, values[row : row + step]


def _repacked(job: _Slice, matrix: StoredMatrix) -> QuantizedWeight:
    """The source's own blocks."""
    assert matrix.scales is not None
    scale_type = np.float16 if matrix.scales.dtype == "float16" else np.float32
    return repack(job.tensors[0], job.start, job.stop, matrix.offsets, scale_type)


def _quantized(
    values: NDArray[np.float32], matrix: StoredMatrix, tensor: TensorRef, statistics: Statistics | None
) -> StoredWeight:
    try:
        return quantize_matrix(values, matrix, statistics, name=tensor.name)
    except WeightError as error:
        raise WeightError(error.what, where=f"{tensor.name} in {tensor.file}", remedy=error.remedy) from error


def quantize_matrix(
    values: NDArray[np.float32], matrix: StoredMatrix, statistics: Statistics | None = None, *, name: str
) -> StoredWeight:
    """Rows of a weight as its quantizer stores them; the errors are those of `Quantizer.quantize`.

    Args:
        values: float32 [rows, columns].
        statistics: of the inputs, where `matrix.needs_inputs` or `matrix.needs_importance`.
        name: the weight's, for error messages.
    """
    fmt = matrix.number_format
    assert fmt is not None
    half_scales = matrix.scales is not None and matrix.scales.dtype == "float16"
    meant = matrix.before_rounding(values)
    return quantizer(matrix.quantizer).quantize(meant, fmt, statistics, name=name, half_scales=half_scales)


def _write_vectors(
    architecture: Architecture, layout: Layout, data: DataFile, report: Report, treatments: Mapping[str, Treatment]
) -> None:
    for name, stored in layout.vectors.items():
        weight = architecture.weights.get(name)
        if weight is not None:
            values, tensor = read_weight(weight), weight.parts[0].tensor
            if name in treatments:
                values = treatments[name].apply(values)
            converted = to_half(values, stored.dtype, tensor, half=layout.half)
            if layout.half is not None or stored.dtype == "float16":
                require_half_vector(weight, values, layout.half)
            data.write(stored, 0, converted)
            report(weight_source_bytes(weight))


def _write_rope(architecture: Architecture, layout: Layout, data: DataFile) -> None:
    spec = architecture.spec
    if "cos_cache" not in layout.vectors:
        return
    if spec.long_rope is None:
        _write_table(spec.rope, 0, spec.context_length, layout, data)
    else:
        _write_table(spec.rope, 0, spec.long_rope.switch, layout, data)
        _write_table(spec.long_rope.rope, spec.long_rope.switch, spec.context_length, layout, data)


def _write_table(rope: Rope, first_row: int, rows: int, layout: Layout, data: DataFile) -> None:
    cos_cache, sin_cache = layout.vectors["cos_cache"], layout.vectors["sin_cache"]
    dtype = np.float32 if cos_cache.dtype == "float32" else np.float16
    for start in range(0, rows, ROPE_ROWS):
        cos, sin = rope_table(rope, start, min(start + ROPE_ROWS, rows))
        data.write(cos_cache, first_row + start, cos.astype(dtype))
        data.write(sin_cache, first_row + start, sin.astype(dtype))
