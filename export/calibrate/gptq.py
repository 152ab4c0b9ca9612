"""GPTQ of a whole decoder, one layer in memory at a time.

Calibration sequences pass through the decoder layer by layer, twice: through the float model, and through what is
quantized so far, down to the linear layers before the one in work. That one is fitted to give on the inputs it will
really see what the float model gives on its own; see `quantize/gptaq.py`. In memory: one layer in float32 and once more
decoded, the statistics of one linear layer, and the hidden states of both models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.export.calibrate.fitted_head import pack_head
from edgephi.export.calibrate.layer import LayerGraph, layer_weights
from edgephi.export.calibrate.streams import Streams, gather
from edgephi.export.spec import HEAD, Architecture, Weight
from edgephi.export.weights.data_file import DataFile, Journal
from edgephi.export.weights.embedding import embed
from edgephi.export.weights.layout import Layout, StoredMatrix
from edgephi.export.weights.lpbq_storage import read_lpbq, write_lpbq
from edgephi.export.weights.pack import Report, pack_weights, round_matrix, weight_source_bytes, write_quantized
from edgephi.export.weights.transforms import read_weight
from edgephi.quantize.formats import BlockFormat, QuantizedWeight, dequantize
from edgephi.quantize.gptaq import compensate
from edgephi.quantize.gptq import gptq, gptq_lpbq
from edgephi.quantize.lpbq import LpbqFormat, LpbqWeight
from edgephi.quantize.per_channel import quantize_rows

Float32 = NDArray[np.float32]


def group(layer: int) -> str:
    """The journal's name for the linear layers of a decoder layer."""
    return f"layers.{layer}.linear"


def takes_gptq(weight: Weight, layout: Layout) -> bool:
    """Whether GPTQ decides the codes of a weight."""
    matrix = layout.matrices.get(weight.name) if weight.role == "linear" or weight.name == HEAD else None
    return matrix is not None and matrix.format is not None and matrix.format.bits == 4


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

    Args:
        layout: what it has no place for is used and not written (an embedding that lies in another file).

    Raises:
        EdgephiError: see `pack_weights` and `pack_calibrated`.
    """
    others = {
        name: weight
        for name, weight in architecture.weights.items()
        if (name in layout.matrices or name in layout.vectors) and not takes_gptq(weight, layout)
    }
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
    """Quantize 4-bit linear weights, and a 4-bit head, with GPTQ and write them to their places.

    What the journal holds, and whose bytes are still those, is only run again.

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
    start = embed(architecture, tokens)
    hidden = Streams(start, start)
    for layer in range(spec.layers):
        weights = layer_weights(architecture, layer)
        graph = LayerGraph(architecture, layer, tokens.shape[1])
        linear = [name for name, weight in weights.items() if takes_gptq(weight, layout)]
        exact = {name: read_weight(weight) for name, weight in weights.items()}
        values = dict(exact)
        tensors = [tensor for name in linear for tensor in layout.matrices[name].tensors]
        if data.holds(tensors, journal.done.get(group(layer))):
            for name in linear:
                values[name] = _read_values(data, layout.matrices[name])
                report(weight_source_bytes(weights[name]))
        else:
            formats = {name: _format(layout.matrices[name]) for name in linear}
            exponents = {name: layout.matrices[name].scale_exponent for name in linear}
            for name, packed in fit_layer(graph, hidden, exact, values, formats, exponents):
                if isinstance(packed, LpbqWeight):
                    write_lpbq(packed, layout.matrices[name], data)
                else:
                    tensor = weights[name].parts[0].tensor
                    write_quantized(packed, layout.matrices[name], 0, data, tensor, layout.half)
                # scales lose some bits where they are stored
                values[name] = _read_values(data, layout.matrices[name])
                report(weight_source_bytes(weights[name]))
            journal.add(group(layer), data.written(tensors))
        for name, weight in weights.items():
            if weight.role in ("linear", "expert") and name not in linear:
                values[name] = _rounded(values[name], layout.matrices[name], name)
        hidden = Streams(graph.run(hidden.exact, exact), graph.run(hidden.actual, values))
    if HEAD in architecture.weights and takes_gptq(architecture.weights[HEAD], layout):
        tensors = list(layout.matrices[HEAD].tensors)
        if data.holds(tensors, journal.done.get(HEAD)):
            report(weight_source_bytes(architecture.weights[HEAD]))
        else:
            pack_head(architecture, layout.matrices[HEAD], hidden, data, report, layout.half)
            journal.add(HEAD, data.written(tensors))


def fit_layer(
    graph: LayerGraph,
    hidden: Streams,
    exact: Mapping[str, Float32],
    values: dict[str, Float32],
    formats: Mapping[str, BlockFormat | LpbqFormat],
    exponents: Mapping[str, int] | None = None,
) -> Iterator[tuple[str, QuantizedWeight | LpbqWeight]]:
    """Quantize the linear weights of one layer, each to what it multiplies once those before it are quantized.

    Args:
        exact: all weights of the layer, float.
        values: the same; those that were quantized are replaced by what they decode to.
        formats: of the weights to quantize, by name, in the order in which the layer uses them.
        exponents: powers of two by which weights are multiplied before (`StoredMatrix.scale_exponent`), by name.

    Raises:
        EngineError, WeightError, QuantizationError: see `LayerGraph.run` and `gptq`.
    """
    for name, fmt in formats.items():
        hessian, cross = _statistics(graph, name, hidden, exact, values)
        target = compensate(exact[name], hessian, cross, name=name)
        del cross
        packed: QuantizedWeight | LpbqWeight
        if isinstance(fmt, LpbqFormat):
            packed = gptq_lpbq(target, hessian, fmt, name=name)
            values[name] = packed.values()
        else:
            exponent = (exponents or {}).get(name, 0)
            packed = gptq(np.ldexp(target, exponent), hessian, fmt, name=name, half_scales=True)
            values[name] = np.ldexp(dequantize(packed), -exponent)
        del hessian, target
        yield name, packed


def _statistics(
    graph: LayerGraph, name: str, hidden: Streams, exact: Mapping[str, Float32], values: Mapping[str, Float32]
) -> tuple[Float32, Float32]:
    """Hessian A^T A and drift A^T (X - A) of a linear layer's inputs: A the actual ones, X those of the float model."""
    pairs = zip(graph.inputs(name, hidden.actual, values), graph.inputs(name, hidden.exact, exact), strict=True)
    return gather(pairs, exact[name].shape[1])


def _format(matrix: StoredMatrix) -> BlockFormat | LpbqFormat:
    assert matrix.format is not None
    return matrix.format if matrix.channel_scales is None else LpbqFormat(matrix.format.block_size)


def _rounded(values: Float32, matrix: StoredMatrix, name: str) -> Float32:
    """What is stored of a weight that GPTQ does not decide."""
    if matrix.format is not None:
        return matrix.after_rounding(dequantize(round_matrix(values, matrix, name=name)))
    if matrix.channel_scales is None:
        return values
    codes, scales = quantize_rows(values, name=name)
    return codes * scales[:, None]


def _read_values(data: DataFile, matrix: StoredMatrix) -> Float32:
    """What the written codes of a matrix decode to."""
    if matrix.channel_scales is not None:
        return read_lpbq(data, matrix).values()
    assert matrix.format is not None and matrix.scales is not None
    zero_points = data.read(matrix.zero_points) if matrix.zero_points is not None else None
    stored = QuantizedWeight(
        matrix.format,
        matrix.columns,
        data.read(matrix.codes).astype(np.uint8, copy=False),
        data.read(matrix.scales).astype(np.float32, copy=False),
        None if zero_points is None else zero_points.astype(np.uint8, copy=False),
    )
    return matrix.after_rounding(dequantize(stored))
