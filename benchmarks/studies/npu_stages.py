"""The NPU's graphs before they are compiled, on onnxruntime's CPU kernels: what benchmarks measure their quality on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import NpuNumerics
from edgephi.devices.cpu import decode_threads
from edgephi.devices.hexagon import HexagonTarget
from edgephi.export.calibrate.text import calibration_tokens
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.npu.decoder import NpuDecoder, npu_decoder, stages
from edgephi.export.npu.layers import pack_layers, plan_layers
from edgephi.export.npu.static_graph import INPUT_IDS, Stage, embedding_graph, head_graph, hidden_name
from edgephi.export.plan import ExportPlan
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.pack import Report, pack_weights
from edgephi.ort import open_session, session_options

Hidden = NDArray[np.float16]


@dataclass
class CachedTokens:
    """KV cache, (key, value) of every layer, [1, kv_heads, rows, head_dim], and how much of it is filled."""

    cache: list[tuple[NDArray[np.generic], NDArray[np.generic]]]
    length: int = 0


def _quiet(count: int) -> None:
    pass


class UncompiledStages:
    """The NPU's graphs on the CPU.

    Args:
        plan: made with `integers` for w4a16.
        folder: where weights and graphs are written.
        report: told the source bytes of every finished weight.
    """

    def __init__(
        self,
        plan: ExportPlan,
        target: HexagonTarget,
        folder: Path,
        numerics: NpuNumerics = "float16",
        report: Report = _quiet,
    ) -> None:
        self._cached: np.dtype[np.generic] = np.dtype(np.uint8 if numerics == "w4a16" else np.float16)
        self._decoder = npu_decoder(plan.architecture, target)
        self._chunk = target.chunk
        self._stages = stages(self._decoder.inner.spec, target, self._decoder.cache_rows)
        _write(plan, self._decoder, numerics, self._stages, folder, report)
        self._embedding = _open(folder / "outer" / "embedding.onnx", optimized=True)
        self._head = _open(folder / "outer" / "head.onnx", optimized=True)
        self.graphs = tuple(folder / "inner" / f"{stage.name}.onnx" for stage in self._stages)
        """What is there to compile."""
        self._sessions = [_open(graph, optimized=False) for graph in self.graphs]

    def sequence(self) -> CachedTokens:
        """An empty one."""
        spec = self._decoder.inner.spec
        shape = (1, spec.kv_heads, self._decoder.cache_rows, spec.head_dim)
        return CachedTokens(
            [(np.zeros(shape, self._cached), np.zeros(shape, self._cached)) for _ in range(spec.layers)]
        )

    def append(self, sequence: CachedTokens, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, vocabulary] of n more tokens, computed in chunks; a single one by the graphs for decoding."""
        found = [
            self._append(sequence, list(tokens[start : start + self._chunk]))
            for start in range(0, len(tokens), self._chunk)
        ]
        return np.concatenate(found)

    def _append(self, sequence: CachedTokens, tokens: list[int]) -> NDArray[np.float32]:
        size = 1 if len(tokens) == 1 else self._chunk
        ids = np.array([[*tokens, *[0] * (size - len(tokens))]], np.int64)
        hidden: Hidden = self._embedding.run(None, {INPUT_IDS: ids})[0]
        for stage, session in zip(self._stages, self._sessions, strict=True):
            if stage.tokens == size:
                hidden = self._run(stage, session, hidden, sequence)
        sequence.length += len(tokens)
        name = hidden_name(self._decoder.inner.spec.layers)
        logits: NDArray[np.float32] = self._head.run(None, {name: hidden[:, : len(tokens)]})[0][0]
        return logits

    def _run(self, stage: Stage, session: Any, hidden: Hidden, sequence: CachedTokens) -> Hidden:
        past = [array for layer in stage.layers for array in sequence.cache[layer]]
        last = np.full((1, 1), sequence.length + stage.tokens - 1, np.int32)
        total = np.full(1, stage.cache_rows, np.int32)
        computed: Hidden
        computed, *present = session.run(None, dict(zip(stage.inputs, (hidden, last, total, *past), strict=True)))
        for array, updated in zip(past, present, strict=True):
            array[:] = updated
        return computed


def _write(
    plan: ExportPlan, decoder: NpuDecoder, numerics: NpuNumerics, planned: Sequence[Stage], folder: Path, report: Report
) -> None:
    """Weights and graphs, as `edgephi.export.npu.pipeline` writes them for the compiler."""
    import onnx_ir as ir

    outside, inside = folder / "outer", folder / "inner"
    for part in (outside, inside):
        part.mkdir(parents=True)
    recipe = plan.recipe
    outer, inner = plan_storage(decoder.outer, recipe), plan_layers(decoder, recipe, numerics)
    journal = Journal(inside / JOURNAL, "")
    pack_weights(decoder.outer, outer, outside / DATA_FILE, Journal(outside / JOURNAL, ""), 1, report)
    tokens = None
    if plan.text:
        tokens = calibration_tokens(plan.architecture, plan.tokenizer, plan.text, inside, journal, 1)
    build = pack_layers(decoder, inner, recipe, numerics, tokens, inside, journal, 1, report)
    spec = decoder.inner.spec
    ir.save(embedding_graph(spec, outer, recipe), outside / "embedding.onnx")
    ir.save(head_graph(spec, outer, recipe), outside / "head.onnx")
    for stage in planned:
        ir.save(build(stage), inside / f"{stage.name}.onnx")


def _open(graph: Path, *, optimized: bool) -> Any:
    # fusions would compute the layers otherwise than they are written. Embedding and head run on a PC's CPU anyway, and
    # onnxruntime 1.31's MatMulNBits gives zeros when its scales are a Cast that was not folded: the head's are
    options = session_options(threads=decode_threads(), spinning=False, optimizations="basic" if optimized else "none")
    return open_session(graph, options, where=graph.name, remedy="Report it with the model's name")
