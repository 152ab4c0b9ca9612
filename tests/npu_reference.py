"""The uncompiled stages of an NPU bundle on onnxruntime's CPU kernels, driven as the NPU is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgephi.bundle import NpuNumerics
from edgephi.devices.hexagon import HexagonTarget, target_of
from edgephi.devices.profile import load_profile
from edgephi.export.calibrate.text import CalibrationSource, calibration_tokens
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.npu.decoder import npu_decoder, stages
from edgephi.export.npu.layers import pack_layers, plan_layers
from edgephi.export.npu.static_graph import embedding_graph, head_graph
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.pack import pack_weights
from edgephi.export.weights.recipe import make_recipe
from edgephi.runtime.engines.npu_sequence import KvCache, NpuGraphs, NpuSequence

X_ELITE = target_of(load_profile("snapdragon-x-elite"))


@dataclass
class CpuStages:
    """Sessions with every optimization of the layers off: fusions would bring errors of their own."""

    sessions: dict[str, ort.InferenceSession]
    layers: int
    cache_shape: tuple[int, ...]
    cache_type: np.dtype[np.generic]
    chunk: int
    vocabulary: int

    def sequence(self, capacity: int) -> NpuSequence:
        cache = KvCache(self.layers, self.cache_shape, self.cache_type)
        return NpuSequence(NpuGraphs(self._run, self._logits, self.chunk, self.vocabulary), cache, capacity)

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


def cpu_stages(
    source: Path,
    folder: Path,
    target: HexagonTarget = X_ELITE,
    numerics: NpuNumerics = "float16",
    quantize: str = "rtn",
) -> CpuStages:
    """The graphs that `edgephi export --device` compiles, from the same blocks."""
    decoder = npu_decoder(describe(open_folder(source)), target)
    recipe = make_recipe("int4", 32, quantize=quantize)
    spec, inside = decoder.inner.spec, folder / "inner"
    inside.mkdir(parents=True)
    journal = Journal(inside / JOURNAL, "")
    outer, inner = plan_storage(decoder.outer, recipe), plan_layers(decoder, recipe, numerics)
    tokens = None
    if numerics == "w4a16" or quantize == "gptq":  # what an export without a calibration text takes
        text, tokenizer = CalibrationSource(None, 0), tokenizer_from_folder(source)
        tokens = calibration_tokens(describe(open_folder(source)), tokenizer, text, inside, journal, 1)
    build = pack_layers(decoder, inner, recipe, numerics, tokens, inside, journal, 1, lambda count: None)
    graphs = {stage.name: build(stage) for stage in stages(spec, target, decoder.cache_rows)}
    outside = {"embedding": embedding_graph(spec, outer, recipe), "head": head_graph(spec, outer, recipe)}
    (folder / "outer").mkdir()
    outer_journal = Journal(folder / "outer" / JOURNAL, "")
    pack_weights(decoder.outer, outer, folder / "outer" / DATA_FILE, outer_journal, 1, lambda count: None)
    sessions = {}
    for part, models in (("inner", graphs), ("outer", outside)):
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
    dtype = np.dtype(np.uint8 if numerics == "w4a16" else np.float16)
    return CpuStages(sessions, spec.layers, shape, dtype, target.chunk, spec.vocabulary_size)
