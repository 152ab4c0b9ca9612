"""The uncompiled stages of an NPU bundle on onnxruntime's CPU kernels, driven as the NPU is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgephi.bundle import NpuNumerics
from edgephi.devices.hexagon import HexagonTarget, target_of
from edgephi.devices.profile import load_profile
from edgephi.export.calibrate import CalibrationSource, calibration_tokens
from edgephi.export.data_file import JOURNAL, Journal
from edgephi.export.emitter import DATA_FILE
from edgephi.export.families import describe
from edgephi.export.npu.decoder import npu_decoder, stages
from edgephi.export.npu.encodings import Encodings, measure_encodings
from edgephi.export.npu.qdq_graph import qdq_stage_graph
from edgephi.export.npu.qdq_storage import pack_qdq, plan_qdq_storage
from edgephi.export.npu.static_graph import embedding_graph, head_graph, stage_graph
from edgephi.export.pack import pack_weights
from edgephi.export.safetensors_reader import open_folder
from edgephi.export.storage import make_recipe, plan_storage
from edgephi.export.tokenizer_folder import tokenizer_from_folder
from edgephi.runtime.npu import KvCache, NpuEngine

X_ELITE = target_of(load_profile("snapdragon-x-elite"))


@dataclass
class CpuStages:
    """Sessions with every optimization of the layers off: fusions would bring errors of their own."""

    sessions: dict[str, ort.InferenceSession]
    layers: int
    cache_shape: tuple[int, ...]
    chunk: int
    vocabulary: int

    def sequence(self, capacity: int) -> NpuEngine:
        cache = KvCache(self.layers, self.cache_shape)
        return NpuEngine(self._run, self._logits, cache, self.chunk, capacity, self.vocabulary)

    def _run(self, tokens: Sequence[int], past: int, cache: KvCache) -> NDArray[np.float16]:
        hidden = self.sessions["embedding"].run(None, {"input_ids": np.asarray([tokens], np.int64)})[0]
        phase = "decode" if len(tokens) == 1 else "prefill"
        for name, session in self.sessions.items():
            if not name.startswith(phase):
                continue
            first, last = (int(number) for number in name.split("_")[1:])
            feed = {
                f"hidden_states.{first}": hidden,
                "past_sequence_length": np.array([[past + len(tokens) - 1]], np.int32),
                "total_sequence_length": np.array([self.cache_shape[2]], np.int32),
            }
            for layer in range(first, last):
                for part, array in zip(("key", "value"), cache.arrays[layer], strict=True):
                    feed[f"past_key_values.{layer}.{part}"] = array
            hidden, *present = session.run(None, feed)
            flat = [array for pair in cache.arrays[first:last] for array in pair]
            for array, updated in zip(flat, present, strict=True):
                array[:] = updated
        return hidden

    def _logits(self, hidden: NDArray[np.float16]) -> NDArray[np.float32]:
        return self.sessions["head"].run(None, {f"hidden_states.{self.layers}": hidden})[0][0, 0]


def own_encodings(source: Path, folder: Path) -> Encodings:
    """What an export without a calibration text measures."""
    architecture = describe(open_folder(source))
    folder.mkdir(parents=True)
    journal, text = Journal(folder / JOURNAL, ""), CalibrationSource(None, 0)
    tokens = calibration_tokens(architecture, tokenizer_from_folder(source), text, folder, journal, 1)
    return measure_encodings(architecture, tokens)


def cpu_stages(
    source: Path, folder: Path, target: HexagonTarget = X_ELITE, numerics: NpuNumerics = "float16"
) -> CpuStages:
    """The graphs that `edgephi export --device` compiles, from the same blocks."""
    decoder = npu_decoder(describe(open_folder(source)), target)
    recipe = make_recipe("int4", 32)
    half = replace(recipe, float_type="float16", accuracy_level=1)
    spec = decoder.inner.spec
    outer = plan_storage(decoder.outer, recipe)
    pack = pack_weights if numerics == "float16" else pack_qdq
    parts = stages(spec, target, decoder.cache_rows)
    if numerics == "float16":
        inner = plan_storage(decoder.inner, half)
        graphs = {stage.name: stage_graph(spec, inner, half, stage) for stage in parts}
    else:
        inner, encodings = plan_qdq_storage(decoder.inner, half), own_encodings(source, folder / "encodings")
        graphs = {stage.name: qdq_stage_graph(spec, inner, half, encodings, stage) for stage in parts}
    outside = {"embedding": embedding_graph(spec, outer, recipe), "head": head_graph(spec, outer, recipe)}
    sessions = {}
    for part, architecture, layout, models in (
        ("inner", decoder.inner, inner, graphs),
        ("outer", decoder.outer, outer, outside),
    ):
        (folder / part).mkdir(parents=True)
        journal = Journal(folder / part / JOURNAL, "")
        fill = pack if part == "inner" else pack_weights
        fill(architecture, layout, folder / part / DATA_FILE, journal, 1, lambda count: None)
        for name, model in models.items():
            ir.save(model, folder / part / f"{name}.onnx")
            options = ort.SessionOptions()
            # onnxruntime 1.31's MatMulNBits gives zeros when its scales are a Cast that was not folded: the head's are
            levels = ort.GraphOptimizationLevel
            options.graph_optimization_level = levels.ORT_DISABLE_ALL if part == "inner" else levels.ORT_ENABLE_BASIC
            options.intra_op_num_threads = 1
            graph = str(folder / part / f"{name}.onnx")
            sessions[name] = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    shape = (1, spec.kv_heads, decoder.cache_rows, spec.head_dim)
    return CpuStages(sessions, spec.layers, shape, target.chunk, spec.vocabulary_size)
