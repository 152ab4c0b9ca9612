"""Where the weights of QDQ graphs lie until they are compiled, and how they get there.

A linear layer's codes lie as its MatMul takes them, [columns, rows]: int4 with scales of two levels
(`quantize/lpbq.py`), or int8 with a scale a row where four bits cost the model most. Norms and rotary tables are
float16.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import UnsupportedModelError
from edgephi.export.calibrate.fit import is_fitted, pack_fitted
from edgephi.export.journal import Journal
from edgephi.export.spec import Architecture, Weight
from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.layout import Allocator, Layout, StoredMatrix, initializer_name, rope_tables
from edgephi.export.weights.pack import Report, pack_weights, quantize_matrix, weight_source_bytes
from edgephi.export.weights.recipe import Recipe, decided_by, require_written
from edgephi.export.weights.stored import write_stored
from edgephi.export.weights.transforms import read_weight
from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.lpbq import LpbqFormat

EIGHT_BIT = ("qkv", "down")
"""Modules with 8-bit weights, two fifths of a Phi's. SmolLM2-135M, 1,024 tokens of WikiText-2, KL divergence to float:
0.41 with none, 0.38 with `o`, 0.28 with `qkv`, 0.24 with `down`, 0.11 with both of these. After GPTQ (2,044 other
predictions): 0.114 with none, 0.061 with both."""


def plan_qdq_storage(architecture: Architecture, recipe: Recipe) -> Layout:
    """A place for every weight of the layers.

    Raises:
        UnsupportedModelError: rows of a 4-bit weight are no whole blocks, or odd in number.
        UsageError: the recipe's quantizer does not write scales of two levels.
    """
    assert recipe.linear is not None
    require_written(recipe.quantizer, LpbqFormat(recipe.linear.block_size))
    allocator, layers = Allocator(), architecture.spec.layers
    matrices, vectors = {}, {}
    for weight in architecture.weights.values():
        name = initializer_name(weight.name, layers)
        if weight.role == "vector":
            vectors[weight.name] = allocator.place(name, weight.shape, recipe.float_type)
        else:
            matrices[weight.name] = _place(allocator, name, weight, recipe)
    for name, shape in rope_tables(architecture.spec).items():
        vectors[name] = allocator.place(name, shape, recipe.float_type)
    return Layout(matrices, vectors, allocator.end)


def _place(allocator: Allocator, name: str, weight: Weight, recipe: Recipe) -> StoredMatrix:
    assert recipe.linear is not None
    (rows, columns), block_size = weight.shape, recipe.linear.block_size
    if weight.name.split(".")[-2] in EIGHT_BIT:
        codes = allocator.place(f"{name}_Q8", (columns, rows), "uint8")
        return StoredMatrix(
            rows, columns, None, codes, channel_scales=allocator.place(f"{name}_Q8_channel_scales", (rows,), "float32")
        )
    if columns % block_size or rows % 2:
        raise UnsupportedModelError(
            f"the NPU takes whole blocks and an even number of rows, and this weight of {rows} rows has {columns} "
            f"columns, with blocks of {block_size}",
            where=weight.name,
            remedy="Choose a --block-size that divides them",
        )
    base = f"{name}_Q4G{block_size}"
    return StoredMatrix(
        rows,
        columns,
        BlockFormat(4, block_size, symmetric=True),
        allocator.place(base, (columns, rows // 2), "uint8"),
        allocator.place(f"{base}_scales", (columns // block_size, rows), "uint8"),
        channel_scales=allocator.place(f"{base}_channel_scales", (rows,), "float32"),
        quantizer=decided_by(recipe, weight, LpbqFormat(block_size)),
    )


def pack_qdq(
    architecture: Architecture,
    layout: Layout,
    tokens: NDArray[np.int64] | None,
    path: Path,
    journal: Journal,
    threads: int,
    report: Report,
) -> None:
    """Fill the data file; linear weights the journal holds are left as they are. One of them is in memory at a time.

    Args:
        architecture: the whole decoder; what the layout has no place for is not written.
        tokens: calibration text, int64 [sequences, length]; needed where a quantizer needs inputs.

    Raises:
        EdgephiError: as `pack_weights` and `pack_fitted`.
    """
    vectors = {name: weight for name, weight in architecture.weights.items() if name in layout.vectors}
    pack_weights(replace(architecture, weights=vectors), layout, path, journal, threads, report)
    data = DataFile(path)
    try:
        for name, matrix in layout.matrices.items():
            weight, group = architecture.weights[name], f"{name} of two levels"
            if is_fitted(weight, layout):
                continue
            if not data.holds(matrix.tensors, journal.done.get(group)):
                packed = quantize_matrix(read_weight(weight), matrix, name=name)
                write_stored(packed, matrix, 0, data, weight.parts[0].tensor)
                journal.add(group, data.written(matrix.tensors))
            report(weight_source_bytes(weight))
        if any(matrix.needs_inputs for matrix in layout.matrices.values()):
            assert tokens is not None
            pack_fitted(architecture, layout, tokens, data, journal, report)
    finally:
        data.close()
