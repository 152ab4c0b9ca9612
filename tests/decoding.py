"""Running an exported graph through plain onnxruntime, one thread, and a folder through stock onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.variants import cpu_opset, plan_variants
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.spec import Architecture, Checkpoint
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.pack import pack_weights
from edgephi.export.weights.recipe import Precision, Recipe, make_recipe


def build_graph(source: Path | Checkpoint, folder: Path, precision: Precision, block_size: int = 32) -> Path:
    """Export graph and weights (no tokenizer: the tiny checkpoints have none), computing in float32."""
    return build_graph_with(source, folder, make_recipe(precision, block_size, accuracy_level=1))


def build_graph_with(source: Path | Checkpoint, folder: Path, recipe: Recipe) -> Path:
    """The same with any recipe."""
    return build_graph_of(describe(open_folder(source) if isinstance(source, Path) else source), folder, recipe)


def build_graph_of(architecture: Architecture, folder: Path, recipe: Recipe) -> Path:
    """The same of a decoder that is described already."""
    layout = plan_storage(architecture, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    pack_weights(architecture, layout, folder / DATA_FILE, Journal(folder / JOURNAL, ""), 1, lambda count: None)
    opset = cpu_opset(architecture.spec)
    write_graph(architecture.spec, layout, recipe, folder / "model.onnx", opset=opset)
    return folder / "model.onnx"


def build_variants(source: Path | Checkpoint, folder: Path, recipe: Recipe, devices: Sequence[str]) -> dict[str, Path]:
    """One data file and a graph for each device."""
    build_graph_with(source, folder, recipe)
    architecture = describe(open_folder(source) if isinstance(source, Path) else source)
    layout = plan_storage(architecture, recipe)
    graphs = {}
    for variant in plan_variants(devices, architecture.spec, layout, recipe):
        graph = graphs[variant.device] = folder / variant.file
        one = variant.recipe
        form = {"separate": variant.separate, "row_numbers": variant.row_numbers}
        write_graph(architecture.spec, layout, one, graph, opset=variant.opset, **form)
    return {str(device): path for device, path in graphs.items()}


class Decoder:
    """A graph and its KV cache; `inputs` go into every run."""

    def __init__(self, graph: Path, inputs: Mapping[str, NDArray[Any]] | None = None) -> None:
        self.inputs = inputs or {}
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.past = {
            value.name: np.zeros(
                (1, value.shape[1], 0, value.shape[3]), np.float16 if "float16" in value.type else np.float32
            )
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.length = 0
        self.numbered = any(value.name == "position_ids" for value in self.session.get_inputs())

    def feed(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [1, n, vocabulary] of n more tokens [1, n]."""
        self.length += token_ids.shape[1]
        mask = np.ones((1, self.length), np.int64)
        inputs = {"input_ids": token_ids, "attention_mask": mask, **self.inputs, **self.past}
        if self.numbered:
            inputs["position_ids"] = np.arange(self.length - token_ids.shape[1], self.length, dtype=np.int64)[None]
        outputs = self.session.run(None, inputs)
        self.past = dict(zip(self.past, outputs[1:], strict=True))
        return np.asarray(outputs[0], np.float32)

    def feed_one_by_one(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The same logits, token by token."""
        return np.concatenate([self.feed(token_ids[:, i : i + 1]) for i in range(token_ids.shape[1])], axis=1)


def distance(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Largest difference, in units of the reference logits' standard deviation over the vocabulary."""
    return float(np.abs(logits - reference).max() / reference.std(axis=-1).mean())


def genai_tokens(
    folder: Path, prompt: Sequence[int] | NDArray[Any], max_length: int, count: int | None = None
) -> list[int]:
    """What stock onnxruntime-genai answers, greedily: `count` tokens, or all until it stops by itself or is full.

    Args:
        folder: where an NPU's binaries are in it, its provider must be registered.
        prompt: token ids.
        max_length: tokens of prompt and answer that there is room for.
    """
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=max_length, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.asarray(prompt, np.int32))
    tokens: list[int] = []
    while not generator.is_done() if count is None else len(tokens) < count:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens
