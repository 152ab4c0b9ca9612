"""Calibration text that the model writes itself.

A model's own samples show its linear layers what they see in use, and need no data set (Liu et al. 2023, "LLM-QAT",
arXiv 2305.17888). All sequences are sampled side by side, at temperature 1, each from a random token of the vocabulary,
by an int8 export that is removed afterwards: next to what 4 bits cost, 8 bits change nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import EngineError, library_errors
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.genai_config import GRAPH_FILE
from edgephi.export.spec import Architecture
from edgephi.export.weights.layout import Layout, plan_storage
from edgephi.export.weights.pack import pack_weights
from edgephi.export.weights.recipe import Recipe, make_recipe
from edgephi.ort import open_session, session_options
from edgephi.quantize.workers import worker_pool

SEQUENCES_TOGETHER = 8
"""Sampled in one run of the graph."""

_FAILED = "onnxruntime cannot sample from the model"
_OTHERWISE = "Calibrate with a text of yours: --calibration FILE"


def sampling_layout(architecture: Architecture, length: int) -> tuple[Architecture, Recipe, Layout]:
    """What the temporary export consists of: the decoder for sequences of this length, which take its short rope."""
    decoder = replace(architecture, spec=replace(architecture.spec, context_length=length, long_rope=None))
    recipe = make_recipe("int8", 32)
    return decoder, recipe, plan_storage(decoder, recipe)


def sample_text(
    architecture: Architecture, vocabulary: int, shape: tuple[int, int], seed: int, folder: Path, threads: int
) -> NDArray[np.int64]:
    """Sample sequences from the model, int64 [sequences, length].

    Args:
        vocabulary: ids below this may be sampled: the tokenizer's, for an embedding may have more rows.
        shape: sequences and their length.
        seed: of NumPy's default generator; the same seed gives the same text on the same kind of processor.
        folder: for the int8 export; made, and removed at the end.

    Raises:
        EngineError: onnxruntime cannot run the model, or its logits are not finite.
        WeightError, OutputError, SourceError: see `pack_weights`.
    """
    decoder, recipe, layout = sampling_layout(architecture, shape[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        pack_weights(decoder, layout, folder / DATA_FILE, None, threads, lambda count: None)
        write_graph(decoder.spec, layout, recipe, folder / GRAPH_FILE)
        return _sample(decoder, folder / GRAPH_FILE, vocabulary, shape, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sample(
    decoder: Architecture, graph: Path, vocabulary: int, shape: tuple[int, int], seed: int
) -> NDArray[np.int64]:
    groups = -(-shape[0] // SEQUENCES_TOGETHER)
    tokens = np.empty(shape, np.int64)
    with library_errors(_FAILED, where=graph.name, remedy=_OTHERWISE):
        # groups run side by side, each on one thread: neither depends on how many cores there are
        options = session_options(threads=1, spinning=False, kleidiai=False)
        session = open_session(graph, options, where=graph.name, remedy=_OTHERWISE, refusal=_FAILED)

        def write(group: int) -> None:
            part = tokens[group * SEQUENCES_TOGETHER : (group + 1) * SEQUENCES_TOGETHER]
            _write_group(decoder, session, vocabulary, part, np.random.default_rng([seed, group]))

        with worker_pool() as pool:
            list(pool.map(write, range(groups)))
    return tokens


def _write_group(
    decoder: Architecture, session: Any, vocabulary: int, tokens: NDArray[np.int64], rng: np.random.Generator
) -> None:
    """Fill tokens [sequences, length], all sequences side by side."""
    import onnxruntime as ort

    spec, (sequences, length) = decoder.spec, tokens.shape
    tokens[:, 0] = rng.integers(0, vocabulary, sequences)
    binding = session.io_binding()
    # one buffer is past and present: the operator then appends in place instead of copying
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            buffer = np.zeros((sequences, spec.kv_heads, length, spec.head_dim), np.float32)
            cache = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(value.name, cache)
            binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), cache)
    binding.bind_output("logits")
    for position in range(1, length):
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens[:, position - 1 : position]))
        binding.bind_cpu_input("attention_mask", np.ones((sequences, position), np.int64))
        session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()[:, -1, :vocabulary]
        tokens[:, position] = _draw(logits, rng)


def _draw(logits: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """One token a row, with the probabilities of the softmax: the largest of logits plus Gumbel noise."""
    if not np.isfinite(logits.max()):
        raise EngineError("logits are not finite", remedy="Check the checkpoint; its values may be damaged")
    chosen: NDArray[np.int64] = (logits + rng.gumbel(size=logits.shape)).argmax(axis=-1)
    return chosen
