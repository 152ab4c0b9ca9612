"""A head in 4 bits, fitted to what it will multiply.

On SmolLM2-135M, 8 windows of WikiText-2, only the head in 4 bits (blocks of 32): KL divergence 0.062 rounded, 0.014
fitted by GPTQ. Rounding all other weights costs 0.26.

Where a checkpoint's embedding serves as its head, that stays as it is for lookups, and the head is stored once more:
a lookup touches a row, so the embedding costs disk and hardly memory, and the product reads half as much.
"""

from __future__ import annotations

from dataclasses import replace

from edgephi.export.calibrate.float_model import up_to_head
from edgephi.export.calibrate.streams import LayerInputs, gather
from edgephi.export.checkpoint.tensors import require_finite, weight_slices
from edgephi.export.spec import HEAD, Architecture
from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.layout import StoredMatrix
from edgephi.export.weights.pack import Report, quantize_matrix, weight_source_bytes
from edgephi.export.weights.stored import write_stored
from edgephi.export.weights.transforms import read_slice
from edgephi.quantize.gptaq import compensate
from edgephi.quantize.quantizer import Statistics

VALUES_AT_ONCE = 1 << 26
"""Of the head, fitted together: 256 MB, and as much for what they shall become. Each time costs a factorization."""


def with_own_head(architecture: Architecture) -> Architecture:
    """The same decoder, its head a weight of its own."""
    if HEAD in architecture.weights:
        return architecture
    head = replace(architecture.weights["embed.weight"], name=HEAD, role="head")
    return replace(architecture, weights={**architecture.weights, HEAD: head})


def pack_head(
    architecture: Architecture,
    matrix: StoredMatrix,
    hidden: LayerInputs,
    data: DataFile,
    report: Report,
    half: str | None = None,
) -> None:
    """Quantize the head on its inputs and write it to its place.

    Args:
        matrix: blocks, by a quantizer that needs inputs.
        hidden: behind the last layer.
        report: told the source bytes at the end.
        half: see `Layout.half`.

    Raises:
        WeightError, QuantizationError: the head or its statistics cannot be used.
        EngineError: onnxruntime cannot compute its inputs.
        OutputError: the disk is full.
    """
    assert matrix.format is not None
    weight = architecture.weights[HEAD]
    with up_to_head(architecture) as inputs:
        pairs = ((inputs(ours), inputs(theirs)) for ours, theirs in zip(hidden.quantized, hidden.float, strict=True))
        hessian, cross = gather(pairs, weight.shape[1])
    for row, tensors, start, stop in weight_slices(weight, VALUES_AT_ONCE):  # a rotation mixes a head's columns only
        values = read_slice(weight, tensors, start, stop)
        require_finite(values, tensors[0])
        target = compensate(values, hessian, cross, name=HEAD)
        packed = quantize_matrix(target, matrix, Statistics(hessian=hessian), name=HEAD)
        write_stored(packed, matrix, row, data, tensors[0], half)
    report(weight_source_bytes(weight))
