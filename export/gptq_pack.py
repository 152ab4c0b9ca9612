"""GPTQ of a whole decoder, one layer in memory at a time.

Calibration sequences pass through the decoder layer by layer. Before a layer is quantized, its float weights show what
its linear layers multiply; after that its quantized weights compute what the next layer sees. So every layer is fitted
to the errors of those before it. In memory: one layer in float32, its Hessians, and the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.export.data_file import DataFile, Journal
from edgephi.export.folded import fold_values, read_weight
from edgephi.export.pack import Report, pack_weights, weight_source_bytes, write_quantized
from edgephi.export.read import read_rows, require_finite
from edgephi.export.recorded_layer import LayerGraph, layer_weights
from edgephi.export.spec import Architecture, Weight
from edgephi.export.storage import Layout, StoredMatrix
from edgephi.quantize import BlockFormat, QuantizedWeight, dequantize, gptq, round_to_nearest
from edgephi.quantize.workers import add_gram, mirror, worker_pool

Float32 = NDArray[np.float32]

ROWS_AT_ONCE = 2048
"""Inputs multiplied together: 64 MB at 8,192 columns."""


def group(layer: int) -> str:
    """The journal's name for the linear layers of a decoder layer."""
    return f"layers.{layer}.linear"


def takes_gptq(weight: Weight, layout: Layout) -> bool:
    """Whether GPTQ decides the codes of a weight."""
    fmt = layout.matrices[weight.name].format if weight.role == "linear" else None
    return fmt is not None and fmt.bits == 4


def pack_with_gptq(
    architecture: Architecture,
    layout: Layout,
    tokens: NDArray[np.int64],
    path: Path,
    journal: Journal,
    threads: int,
    report: Report,
) -> None:
    """Fill the data file as `pack_weights` does, with 4-bit linear weights quantized by GPTQ on the calibration tokens.

    Raises:
        EdgephiError: see `pack_weights` and `pack_calibrated`.
    """
    others = {name: weight for name, weight in architecture.weights.items() if not takes_gptq(weight, layout)}
    pack_weights(replace(architecture, weights=others), layout, path, journal, threads, report)
    data = DataFile(path)
    try:
        pack_calibrated(architecture, layout, tokens, data, journal, report)
    finally:
        data.close()


def pack_calibrated(
    architecture: Architecture,
    layout: Layout,
    tokens: NDArray[np.int64],
    data: DataFile,
    journal: Journal,
    report: Report,
) -> None:
    """Quantize 4-bit linear weights with GPTQ and write them to their places; what the journal holds is only run again.

    Experts are seen by few tokens each: they stay as rounding stores them, and later layers are fitted to that. So are
    8-bit weights, for which rounding is good enough.

    Args:
        tokens: int64 [sequences, length].
        report: told the source bytes of every finished weight.

    Raises:
        WeightError, QuantizationError: a weight or its statistics cannot be used.
        EngineError: onnxruntime cannot run a layer.
        OutputError: the disk is full.
    """
    spec = architecture.spec
    hidden = embed(architecture, tokens)
    for layer in range(spec.layers):
        weights = layer_weights(architecture, layer)
        graph = LayerGraph(architecture, layer, tokens.shape[1])
        linear = [name for name, weight in weights.items() if takes_gptq(weight, layout)]
        if group(layer) in journal.done:
            values = {name: read_weight(weight) for name, weight in weights.items() if name not in linear}
            for name in linear:
                values[name] = dequantize(read_quantized(data, layout.matrices[name]))
                report(weight_source_bytes(weights[name]))
        else:
            values = {name: read_weight(weight) for name, weight in weights.items()}
            formats = {name: _format(layout.matrices[name]) for name in linear}
            for name, packed in fit_layer(graph, hidden, values, formats):
                write_quantized(packed, layout.matrices[name], 0, data, weights[name].parts[0].tensor)
                # scales lose some bits where they are stored
                values[name] = dequantize(read_quantized(data, layout.matrices[name]))
                report(weight_source_bytes(weights[name]))
            journal.add(group(layer))
        for name, weight in weights.items():
            rounded = weight.role in ("linear", "expert") and name not in linear
            fmt = layout.matrices[name].format if rounded else None
            if fmt is not None:
                values[name] = dequantize(round_to_nearest(values[name], fmt, name=name))
        hidden = graph.run(hidden, values)


def fit_layer(
    graph: LayerGraph, hidden: Float32, values: dict[str, Float32], formats: Mapping[str, BlockFormat]
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Quantize the linear weights of one layer to what they multiply when the layer computes in float.

    Args:
        hidden: hidden states before the layer, float32 [sequences, length, hidden].
        values: all weights of the layer; those that were quantized are replaced by what they decode to.
        formats: of the weights to quantize, by name.

    Raises:
        EngineError, WeightError, QuantizationError: see `LayerGraph.run` and `gptq`.
    """
    sums = {name: _Hessian(values[name].shape[1]) for name in formats}

    with worker_pool() as pool:

        def accumulate(name: str, inputs: Float32) -> None:
            if name in sums:
                sums[name].add(pool, inputs)

        graph.run(hidden, values, accumulate)
        for name, fmt in formats.items():
            packed = gptq(values[name], sums.pop(name).total(pool), fmt, name=name)
            values[name] = dequantize(packed)
            yield name, packed


class _Hessian:
    """X^T X of inputs that come in pieces; a product of many rows is worth more than its sum costs."""

    def __init__(self, columns: int) -> None:
        self._sum = np.zeros((columns, columns), np.float32)
        self._waiting: list[Float32] = []

    def add(self, pool: ThreadPoolExecutor, inputs: Float32) -> None:
        self._waiting.append(inputs)
        if sum(map(len, self._waiting)) >= ROWS_AT_ONCE:
            self._multiply(pool)

    def total(self, pool: ThreadPoolExecutor) -> Float32:
        if self._waiting:
            self._multiply(pool)
        mirror(self._sum)
        return self._sum

    def _multiply(self, pool: ThreadPoolExecutor) -> None:
        rows = np.concatenate(self._waiting)
        self._waiting = []
        add_gram(pool, self._sum, rows)


def _format(matrix: StoredMatrix) -> BlockFormat:
    assert matrix.format is not None
    return matrix.format


def embed(architecture: Architecture, tokens: NDArray[np.int64]) -> Float32:
    """The hidden states before the first layer, float32 [sequences, length, hidden]; reads the tokens' rows only."""
    weight = architecture.weights["embed.weight"]
    ids, places = np.unique(tokens, return_inverse=True)
    rows = np.empty((len(ids), weight.shape[1]), np.float32)
    first = 0
    for part in weight.parts:
        inside = np.flatnonzero((ids >= first) & (ids < first + part.stop - part.start))
        for place in inside:
            row = int(ids[place]) - first + part.start
            rows[place] = read_rows(part.tensor, row, row + 1)[0]
        first += part.stop - part.start
    require_finite(rows, weight.parts[0].tensor)
    rows = fold_values(weight, rows)
    rows *= np.float32(architecture.spec.embedding_scale)
    return rows[places.reshape(tokens.shape)]


def read_quantized(data: DataFile, matrix: StoredMatrix) -> QuantizedWeight:
    """What an interrupted export had written of a matrix."""
    assert matrix.scales is not None
    zero_points = data.read(matrix.zero_points) if matrix.zero_points is not None else None
    return QuantizedWeight(
        _format(matrix),
        matrix.columns,
        data.read(matrix.codes).astype(np.uint8, copy=False),
        data.read(matrix.scales).astype(np.float32, copy=False),
        None if zero_points is None else zero_points.astype(np.uint8, copy=False),
    )
