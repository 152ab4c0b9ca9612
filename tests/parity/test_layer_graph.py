"""Layers computed one by one, for calibration, give the hidden states of the whole published model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.export.calibrate.layer import LayerGraph, layer_weights, start_of
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.spec import Architecture
from edgephi.export.weights.embedding import embed
from edgephi.export.weights.transforms import read_weight
from tests.decoding import distance

Float32 = NDArray[np.float32]
CASES = (
    "llama-gqa",
    "llama-bias",
    "llama3-rope",
    "phi3-mha",
    "phi3-window",
    "phi3-gqa-partial",
    "phi-parallel",
    "phimoe",
    "phi3-longrope-short",
)


def logits(architecture: Architecture, hidden: Float32) -> Float32:
    """The last norm and the head, in float64."""
    spec = architecture.spec
    vectors = {name: read_weight(architecture.weights[name]) for name in ("norm.weight",)}
    values = hidden.astype(np.float64)
    if spec.norm == "layer":
        values -= values.mean(axis=-1, keepdims=True)
    values /= np.sqrt(np.square(values).mean(axis=-1, keepdims=True) + spec.norm_epsilon)
    values *= vectors["norm.weight"]
    if spec.norm == "layer":
        values += read_weight(architecture.weights["norm.bias"])
    head = architecture.weights["embed.weight" if spec.tied_embedding else "head.weight"]
    result = values @ read_weight(head).T.astype(np.float64)
    if "head.bias" in architecture.weights:
        result += read_weight(architecture.weights["head.bias"])
    return np.asarray(result, np.float32)


@pytest.mark.parametrize("case", CASES)
def test_layer_by_layer_equals_transformers(case: str, fixtures: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    architecture, tokens = describe(open_folder(fixtures / case)), reference["input_ids"]
    hidden = embed(architecture, tokens)
    for layer in range(architecture.spec.layers):
        weights = {name: read_weight(weight) for name, weight in layer_weights(architecture, layer).items()}
        hidden = LayerGraph(architecture, layer, tokens.shape[1]).run(hidden, weights)
    assert distance(logits(architecture, hidden), reference["logits"]) < 1e-4


def test_layers_that_multiply_the_same_report_the_same(fixtures: Path) -> None:
    architecture = describe(open_folder(fixtures / "phi-parallel"))
    hidden = embed(architecture, np.arange(24).reshape(2, 12) % architecture.spec.vocabulary_size)
    weights = {name: read_weight(weight) for name, weight in layer_weights(architecture, 0).items()}
    graph = LayerGraph(architecture, 0, 12)
    known = start_of(hidden)
    qkv, up = (list(graph.inputs(f"layers.0.{name}.weight", known, weights)) for name in ("qkv", "up"))
    np.testing.assert_array_equal(qkv, up)


def test_the_inputs_reported_are_what_each_weight_multiplies(fixtures: Path) -> None:
    architecture = describe(open_folder(fixtures / "llama-gqa"))
    spec = architecture.spec
    hidden = embed(architecture, np.arange(24).reshape(2, 12) % spec.vocabulary_size)
    weights = {name: read_weight(weight) for name, weight in layer_weights(architecture, 0).items()}
    graph = LayerGraph(architecture, 0, 12)
    after = graph.run(hidden, weights)
    linear = ("qkv", "o", "gate_up", "down")
    known = start_of(hidden)
    inputs = {name: np.stack(list(graph.inputs(f"layers.0.{name}.weight", known, weights))) for name in linear}
    assert {name: values.shape for name, values in inputs.items()} == {
        "qkv": (2, 12, spec.hidden_size),
        "o": (2, 12, spec.query_size),
        "gate_up": (2, 12, spec.hidden_size),
        "down": (2, 12, spec.intermediate_size),
    }
    # the layer's output is the residual stream plus what o and down make of their inputs
    added = sum(inputs[name] @ weights[f"layers.0.{name}.weight"].T for name in ("o", "down"))
    np.testing.assert_allclose(hidden + added, after, rtol=0, atol=1e-5 * float(np.abs(after).max()))
    normed = hidden / np.sqrt(np.square(hidden).mean(axis=-1, keepdims=True) + spec.norm_epsilon)
    np.testing.assert_allclose(
        inputs["qkv"], normed * weights["layers.0.input_norm.weight"], rtol=0, atol=1e-5 * float(np.abs(normed).max())
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to_the_end", (False, True))
def test_a_layer_in_pieces_gives_what_it_gives_whole(case: str, to_the_end: bool, fixtures: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    architecture, tokens = describe(open_folder(fixtures / case)), reference["input_ids"]
    hidden = embed(architecture, tokens)
    weights = {name: read_weight(weight) for name, weight in layer_weights(architecture, 0).items()}
    linear = [name for name, weight in layer_weights(architecture, 0).items() if weight.role == "linear"]
    graph = LayerGraph(architecture, 0, tokens.shape[1])
    known = start_of(hidden)
    for name in linear:
        for values in graph.inputs(name, known, weights, to_the_end=to_the_end and name == linear[-1]):
            assert values.shape == (tokens.shape[1], weights[name].shape[1])
    after = graph.finish(known, weights)
    assert distance(after, graph.run(hidden, weights)) < 1e-5


@pytest.mark.parametrize(
    ("case", "linear", "last"),
    [
        ("llama-gqa", ("qkv", "o", "gate_up", "down"), ["down.weight"]),
        ("phi-parallel", ("qkv", "o", "up", "down"), ["o.weight", "o.bias", "down.weight", "down.bias"]),
    ],
)
def test_no_piece_of_a_layer_is_computed_twice(
    case: str, linear: tuple[str, ...], last: list[str], fixtures: Path
) -> None:
    architecture = describe(open_folder(fixtures / case))
    hidden = embed(architecture, np.arange(24).reshape(2, 12) % architecture.spec.vocabulary_size)
    weights = {name: read_weight(weight) for name, weight in layer_weights(architecture, 0).items()}
    graph = LayerGraph(architecture, 0, 12)
    whole = graph.run(hidden, weights)
    known = start_of(hidden)
    for name in linear:
        for values in graph.inputs(f"layers.0.{name}.weight", known, weights):
            assert np.isfinite(values).all()
        weights = {name: weights[name] for name in graph.pending(known) if name in weights}
        assert f"layers.0.{name}.weight" in weights
    assert sorted(weights) == sorted(f"layers.0.{name}" for name in last)
    assert distance(graph.finish(known, weights), whole) < 1e-5
