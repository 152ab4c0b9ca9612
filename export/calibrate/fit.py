"""Quantizers that need inputs, on a whole decoder, one layer in memory at a time.

Calibration sequences pass through the decoder layer by layer, twice: through the float model, and through what is
quantized so far, down to the linear layers before the one in work. That one is fitted to give on the inputs it will
really see what the float model gives on its own; see `quantize/gptaq.py`. In memory: one layer in float32 and once more
decoded, the statistics of one linear layer, and the hidden states of both models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.export.calibrate.fitted_head import pack_head
from edgephi.export.calibrate.layer import LayerGraph, layer_weights, start_of
from edgephi.export.calibrate.streams import LayerInputs, gather
from edgephi.export.journal import Journal
from edgephi.export.spec import HEAD, Architecture, Weight
from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.embedding import embed
from edgephi.export.weights.layout import Layout, StoredMatrix
from edgephi.export.weights.pack import Report, pack_weights, quantize_matrix, weight_source_bytes
from edgephi.export.weights.rescaling import Treatment
from edgephi.export.weights.stored import read_values, write_stored
from edgephi.export.weights.transforms import read_weight
from edgephi.quantize.gptaq import compensate
from edgephi.quantize.quantizer import Statistics, StoredWeight

Float32 = NDArray[np.float32]


def group(layer: int) -> str:
    """The journal's name for the linear layers of a decoder layer."""
    return f"layers.{layer}.linear"


def is_fitted(weight: Weight, layout: Layout) -> bool:
    """Whether the codes of a weight are decided on calibration text."""
    matrix = layout.matrices.get(weight.name)
    return matrix is not None and matrix.needs_inputs


def pack_decoder(
    architecture: Architecture,
    layout: Layout,
    tokens: NDArray[np.int64] | None,
    path: Path,
    journal: Journal,
    threads: int,
    report: Report,
    treatments: Mapping[str, Treatment] | None = None,
) -> None:
    """Fill the data file, every weight by the quantizer that the layout names for it.

    Args:
        layout: what it has no place for is used and not written (an embedding that lies in another file).
        tokens: calibration text, int64 [sequences, length]; needed where a quantizer needs inputs.
        treatments: see `pack_weights`.

    Raises:
        EdgephiError: see `pack_weights` and `pack_fitted`.
    """
    others = {
        name: weight
        for name, weight in architecture.weights.items()
        if (name in layout.matrices or name in layout.vectors) and not is_fitted(weight, layout)
    }
    pack_weights(replace(architecture, weights=others), layout, path, journal, threads, report, treatments)
    if any(is_fitted(weight, layout) for weight in architecture.weights.values()):
        assert tokens is not None
        data = DataFile(path)
        try:
            pack_fitted(architecture, layout, tokens, data, journal, report, treatments)
        finally:
            data.close()


def pack_fitted(
    architecture: Architecture,
    layout: Layout,
    tokens: NDArray[np.int64],
    data: DataFile,
    journal: Journal,
    report: Report,
    treatments: Mapping[str, Treatment] | None = None,
) -> None:
    """Quantize the weights whose quantizer needs inputs and write them to their places.

    What the journal holds, and whose bytes are still those, is only run again. Weights that are rounded (experts, 8
    bits) count with what is stored of them: later layers are fitted to that.

    Args:
        tokens: int64 [sequences, length].
        report: told the source bytes of every finished weight.
        treatments: see `pack_weights`; together they leave the float model what it is.

    Raises:
        WeightError, QuantizationError: a weight or its statistics cannot be used.
        EngineError: onnxruntime cannot run a layer.
        OutputError: the disk is full.
    """
    spec, treated = architecture.spec, treatments or {}
    start = embed(architecture, tokens)
    hidden = LayerInputs(start, start)
    for layer in range(spec.layers):
        weights = layer_weights(architecture, layer)
        graph = LayerGraph(architecture, layer, tokens.shape[1])
        linear = [name for name, weight in weights.items() if is_fitted(weight, layout)]
        exact = {name: read_weight(weight) for name, weight in weights.items()}
        for name in weights.keys() & treated.keys():
            exact[name] = treated[name].apply(exact[name])
        # what is rounded counts with what is stored of it
        values = {
            name: _as_stored(values, layout.matrices[name], name)
            if weights[name].role in ("linear", "expert") and name not in linear
            else values
            for name, values in exact.items()
        }
        passage = Passage(start_of(hidden.float), start_of(hidden.quantized))
        del hidden  # so that it goes when the layer has used it
        tensors = [tensor for name in linear for tensor in layout.matrices[name].tensors]
        if data.holds(tensors, journal.done.get(group(layer))):
            for name in linear:
                values[name] = read_values(data, layout.matrices[name])
                report(weight_source_bytes(weights[name]))
        else:
            matrices = {name: layout.matrices[name] for name in linear}
            for name, packed in fit_layer(graph, passage, exact, values, matrices):
                write_stored(packed, matrices[name], 0, data, weights[name].parts[0].tensor, layout.half)
                # scales lose some bits where they are stored
                values[name] = read_values(data, matrices[name])
                report(weight_source_bytes(weights[name]))
            journal.add(group(layer), data.written(tensors))
        hidden = LayerInputs(graph.finish(passage.float, exact), graph.finish(passage.quantized, values))
    if HEAD in architecture.weights and is_fitted(architecture.weights[HEAD], layout):
        tensors = list(layout.matrices[HEAD].tensors)
        if data.holds(tensors, journal.done.get(HEAD)):
            report(weight_source_bytes(architecture.weights[HEAD]))
        else:
            pack_head(architecture, layout.matrices[HEAD], hidden, data, report, layout.half)
            journal.add(HEAD, data.written(tensors))


@dataclass(frozen=True)
class Passage:
    """How far all sequences have come in a layer: of each the values known, by name; see `LayerGraph.inputs`."""

    float: list[dict[str, Float32]]
    """In the float model."""
    quantized: list[dict[str, Float32]]
    """In the model that is quantized so far."""


def fit_layer(
    graph: LayerGraph,
    passage: Passage,
    exact: dict[str, Float32],
    values: dict[str, Float32],
    matrices: Mapping[str, StoredMatrix],
) -> Iterator[tuple[str, StoredWeight]]:
    """Quantize linear weights of one layer, each to what it multiplies once those before it are quantized.

    Args:
        passage: at the layer's start; goes on to the last of these weights.
        exact: all weights of the layer, float; those that are not needed any more are removed.
        values: the same; those that were quantized are replaced by what they decode to.
        matrices: how the weights to quantize are stored, by name, in the order in which the layer uses them.

    Raises:
        EngineError, WeightError, QuantizationError: see `LayerGraph.inputs` and `Quantizer.quantize`.
    """
    last = next(reversed(list(matrices)), None)
    for name, matrix in matrices.items():
        ours = graph.inputs(name, passage.quantized, values)
        # no quantized weight concerns the float model, so its way through the layer can end here
        theirs = graph.inputs(name, passage.float, exact, to_the_end=name == last)
        hessian, cross = gather(zip(ours, theirs, strict=True), exact[name].shape[1])
        for passed in set(values) - graph.pending(passage.quantized):
            exact.pop(passed), values.pop(passed)
        target = compensate(exact[name], hessian, cross, name=name)
        del cross
        packed = quantize_matrix(target, matrix, Statistics(hessian=hessian), name=name)
        values[name] = matrix.after_rounding(packed.values())
        del hessian, target
        yield name, packed


def _as_stored(values: Float32, matrix: StoredMatrix, name: str) -> Float32:
    """What is stored of a weight that is not fitted."""
    if matrix.number_format is None:
        return values
    return matrix.after_rounding(quantize_matrix(values, matrix, name=name).values())
