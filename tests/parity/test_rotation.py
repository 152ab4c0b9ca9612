"""A rotated decoder computes what the published one computes, and its weights are the products the papers name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edgephi.errors import UsageError
from edgephi.export.calibrate.fit import pack_decoder
from edgephi.export.calibrate.float_model import float_logits
from edgephi.export.calibrate.layer import LayerGraph, layer_weights
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.decoder import write_graph
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.spec import Architecture
from edgephi.export.weights.embedding import embed
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.pack import source_bytes
from edgephi.export.weights.recipe import make_recipe
from edgephi.export.weights.rotation import rotate_architecture
from edgephi.export.weights.transforms import read_weight
from edgephi.quantize.hadamard import random_rotation
from tests.decoding import Decoder, build_graph_of, distance
from tests.parity.reference_phi3small import forward, random_weights
from tests.parity.test_phi3small import BASE, token_ids, used, write_checkpoint
from tests.quantized import rms_distance

TOLERANCE = 1e-4  # of a logit's spread
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CASES = sorted(folder.name for folder in FIXTURES.iterdir() if (folder / "reference.npz").is_file())
ROTATED = [case for case in CASES if case != "phimoe"]
SEED = 3


def rotated(source: Path) -> Architecture:
    return rotate_architecture(describe(open_folder(source)), SEED)


def dense(size: int, blocks: int = 1) -> NDArray[np.float64]:
    """The rotation as a matrix, once for each block on the diagonal."""
    q = random_rotation(size, SEED)
    return np.kron(np.eye(blocks), np.diag(q.signs) @ np.kron(q.left, q.right).astype(np.float64))


@pytest.mark.parametrize("case", ROTATED)
def test_fp32_logits_stay_those_of_transformers(case: str, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    graph = build_graph_of(rotated(fixtures / case), tmp_path, make_recipe("fp32", 32))
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < TOLERANCE
    if "longrope" not in case:
        assert distance(Decoder(graph).feed_one_by_one(reference["input_ids"]), reference["logits"]) < TOLERANCE


@pytest.mark.parametrize("case", ["llama-tied", "phi-parallel"])
def test_fp16_stays_within_half_precision(case: str, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    graph = build_graph_of(rotated(fixtures / case), tmp_path, make_recipe("fp16", 32))
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < 3e-2


@pytest.mark.parametrize("tied", [True, False])
def test_phi3small_keeps_its_logits_through_scales_and_a_head_without_a_bias(tied: bool, tmp_path: Path) -> None:
    config = BASE | {"tie_word_embeddings": tied}
    weights, ids = random_weights(config, 0), token_ids(config)
    head = {} if tied else {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    source = write_checkpoint(config, weights | head, tmp_path / "source")
    graph = build_graph_of(rotated(source), tmp_path / "graph", make_recipe("fp32", 32))
    reference = used(config, forward(config, weights, ids[0])[None])
    assert distance(used(config, Decoder(graph).feed(ids)), reference) < TOLERANCE


@pytest.mark.parametrize("case", ["llama-bias", "phi-parallel", "phi3-gqa-partial"])
def test_the_streamed_float_model_and_the_calibrated_layers_see_the_same_rotation(case: str, fixtures: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    ids, architecture = reference["input_ids"], rotated(fixtures / case)
    with float_logits(architecture, [ids[0]]) as model:
        assert distance(model.logits(0, 0, ids.shape[1])[None], reference["logits"]) < TOLERANCE
    plain = describe(open_folder(fixtures / case))
    published, hidden = embed(plain, ids), embed(architecture, ids)
    for layer in range(plain.spec.layers):
        pairs = []
        for each, states in ((plain, published), (architecture, hidden)):
            weights = {name: read_weight(weight) for name, weight in layer_weights(each, layer).items()}
            pairs.append(LayerGraph(each, layer, ids.shape[1]).run(states, weights))
        published, hidden = pairs
    states = published.astype(np.float64)
    if plain.spec.norm == "layer":
        states -= states.mean(axis=-1, keepdims=True)
    expected = states @ dense(plain.spec.hidden_size)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


def test_every_weight_is_the_product_the_papers_name(fixtures: Path) -> None:
    """QuaRot, section 4, on a model whose every linear layer has a bias; 2 KV heads of 16, 4 query heads."""
    source = fixtures / "llama-bias"
    w = {name: tensor.astype(np.float64) for name, tensor in load_file(source / "model.safetensors").items()}
    weights, q = rotated(source).weights, dense(48)
    layer, attention = "model.layers.1", "model.layers.1.self_attn"
    first, second = (w[f"{layer}.{name}_layernorm.weight"] for name in ("input", "post_attention"))
    parts = [w[f"{attention}.{x}_proj.weight"] * first @ q for x in "qk"]
    values = dense(16, 2).T @ (w[f"{attention}.v_proj.weight"] * first @ q)
    biases = [w[f"{attention}.{x}_proj.bias"] for x in "qk"] + [dense(16, 2).T @ w[f"{attention}.v_proj.bias"]]
    gate_up = np.concatenate([w[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up")])
    expected = {
        "embed.weight": w["model.embed_tokens.weight"] @ q,
        "layers.1.input_norm.weight": np.ones(48),
        "layers.1.qkv.weight": np.concatenate([*parts, values]),
        "layers.1.qkv.bias": np.concatenate(biases),
        "layers.1.o.weight": q.T @ w[f"{attention}.o_proj.weight"] @ dense(16, 4),
        "layers.1.o.bias": q.T @ w[f"{attention}.o_proj.bias"],
        "layers.1.gate_up.weight": gate_up * second @ q,
        "layers.1.down.weight": q.T @ w[f"{layer}.mlp.down_proj.weight"],
        "layers.1.down.bias": q.T @ w[f"{layer}.mlp.down_proj.bias"],
        "head.weight": w["lm_head.weight"] * w["model.norm.weight"] @ q,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(read_weight(weights[name]), values, rtol=0, atol=2e-6 * np.abs(values).max())


def test_a_tied_embedding_stays_tied(fixtures: Path, tmp_path: Path) -> None:
    """The last gain is a matrix of its own in the rotated stream, far smaller than a second vocabulary."""
    source = fixtures / "llama-tied"
    architecture = rotated(source)
    assert "head.weight" not in architecture.weights
    gain, q = load_file(source / "model.safetensors")["model.norm.weight"].astype(np.float64), dense(48)
    np.testing.assert_allclose(
        read_weight(architecture.weights["head_input.weight"]), q.T @ np.diag(gain) @ q, rtol=0, atol=1e-6
    )
    plain = plan_storage(describe(open_folder(source)), make_recipe("int8", 32))
    assert plan_storage(architecture, make_recipe("int8", 32)).bytes < plain.bytes + 2 * 48 * 48


def test_calibrated_codes_fit_the_rotated_weights(fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / "llama-gqa" / "reference.npz")
    architecture, recipe = rotated(fixtures / "llama-gqa"), make_recipe("int4", 32, accuracy_level=1)
    layout = plan_storage(architecture, replace(recipe, quantize="gptq"))
    journal, reported = Journal(tmp_path / JOURNAL, ""), []
    tokens = np.random.default_rng(0).integers(0, architecture.spec.vocabulary_size, (32, 24))
    pack_decoder(architecture, layout, tokens, tmp_path / DATA_FILE, journal, 1, reported.append)
    write_graph(architecture.spec, layout, recipe, tmp_path / "model.onnx")
    assert sum(reported) == source_bytes(architecture)
    rounded = build_graph_of(architecture, tmp_path / "rtn", recipe)
    ids, logits = reference["input_ids"], reference["logits"]
    ours = rms_distance(Decoder(tmp_path / "model.onnx").feed(ids), logits)
    assert ours < rms_distance(Decoder(rounded).feed(ids), logits)


def test_a_weight_read_in_pieces_is_the_weight_read_at_once(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, recipe = rotated(fixtures / "phi-parallel"), make_recipe("fp32", 32)
    whole = build_graph_of(architecture, tmp_path / "whole", recipe).with_name(DATA_FILE).read_bytes()
    monkeypatch.setattr("edgephi.export.weights.pack.VALUES_PER_SLICE", 640)
    monkeypatch.setattr("edgephi.export.weights.transforms.VALUES_AT_ONCE", 640)
    pieces = build_graph_of(architecture, tmp_path / "pieces", recipe).with_name(DATA_FILE).read_bytes()
    np.testing.assert_allclose(np.frombuffer(pieces, "<f4"), np.frombuffer(whole, "<f4"), rtol=0, atol=1e-6)


def test_experts_are_refused_with_the_reason(fixtures: Path) -> None:
    with pytest.raises(UsageError, match="experts"):
        rotated(fixtures / "phimoe")


def test_the_rotation_leaves_nothing_of_layer_norm(fixtures: Path) -> None:
    plain = describe(open_folder(fixtures / "phi-parallel"))
    architecture = rotated(fixtures / "phi-parallel")
    assert architecture.spec == replace(plain.spec, norm="rms")
    assert set(plain.weights) - set(architecture.weights) == {
        name for name in plain.weights if name.endswith("norm.bias")
    }
