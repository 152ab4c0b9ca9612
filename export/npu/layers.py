"""The layers' weights for the NPU in one of its two numerics, and the graphs over them: what is there to compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import NpuNumerics
from edgephi.errors import UnsupportedModelError
from edgephi.export.calibrate.fit import pack_decoder
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.journal import Journal
from edgephi.export.npu.decoder import NpuDecoder
from edgephi.export.npu.encodings import find_or_measure
from edgephi.export.npu.qdq_graph import qdq_stage_graph
from edgephi.export.npu.qdq_storage import pack_qdq, plan_qdq_storage
from edgephi.export.npu.static_graph import Stage, stage_graph
from edgephi.export.weights.layout import Layout, plan_storage
from edgephi.export.weights.pack import Report
from edgephi.export.weights.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

DEFAULT_NUMERICS: NpuNumerics = "w4a16"
"""It loses less: SmolLM2-135M, 8,176 predictions of WikiText-2 on which nothing was chosen, KL divergence to float
0.063 after GPTQ and 0.105 rounded; float16 0.080 and 0.246. Its KV cache has half the bytes, its binaries a fifth more,
for two fifths of the weights have 8 bits. Which is faster on a chip is not known."""
ENCODINGS = "encodings.json"
"""Beside the layers' weights until they are compiled."""
Build = Callable[[Stage], "ir.Model"]


def plan_layers(decoder: NpuDecoder, recipe: Recipe, numerics: NpuNumerics) -> Layout:
    """A place for every weight of the layers.

    Args:
        recipe: an int4 one, for the CPU.

    Raises:
        UnsupportedModelError: rows are no whole blocks.
    """
    if numerics == "w4a16":
        return plan_qdq_storage(decoder.inner, _half(recipe))
    layout = plan_storage(decoder.inner, _half(recipe))
    _require_whole_blocks(layout)
    return layout


def pack_layers(
    decoder: NpuDecoder,
    layout: Layout,
    recipe: Recipe,
    numerics: NpuNumerics,
    tokens: NDArray[np.int64] | None,
    folder: Path,
    journal: Journal,
    threads: int,
    report: Report,
) -> Build:
    """Write the weights into DATA_FILE of a folder; returns what makes a stage's graph over them.

    Args:
        layout: of `plan_layers`, with this recipe.
        tokens: calibration text, int64 [sequences, length]; w4a16 needs it, and quantizers that need inputs.

    Raises:
        EdgephiError: as `pack_decoder` and `find_or_measure`.
    """
    spec, path, half = decoder.inner.spec, folder / DATA_FILE, _half(recipe)
    if numerics == "w4a16":
        assert tokens is not None
        # the order of a head's channels, which the NPU has changed, is nothing to a range
        encodings = find_or_measure(decoder.whole, tokens, folder / ENCODINGS, report)
        pack_qdq(decoder.whole, layout, tokens, path, journal, threads, report)
        return partial(qdq_stage_graph, spec, layout, half, encodings)
    pack_decoder(decoder.whole, layout, tokens, path, journal, threads, report)
    return partial(stage_graph, spec, layout, half)


def _half(recipe: Recipe) -> Recipe:
    return replace(recipe, float_type="float16", accuracy_level=1)


def _require_whole_blocks(layout: Layout) -> None:
    for name, matrix in layout.matrices.items():
        assert matrix.format is not None
        size = matrix.format.block_size
        if matrix.inputs % size:
            raise UnsupportedModelError(
                f"the NPU takes whole blocks, and rows of {matrix.inputs} values are not blocks of {size}",
                where=name,
                remedy="Choose a --block-size that divides them",
            )
