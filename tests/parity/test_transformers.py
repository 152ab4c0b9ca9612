"""Exported graphs equal transformers' own classes: the prompt at once, and token by token through the KV cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.decoding import Decoder, build_graph, distance

CASES = (
    "llama-gqa",
    "llama-tied",
    "llama-bias",
    "llama-vocab-trap",
    "llama3-rope",
    "llama-linear-rope",
    "phi3-mha",
    "phi3-window",
    "phi3-gqa-partial",
)

# fractions of a logit's spread
FP32_TOLERANCE = 1e-4
FP16_TOLERANCE = 3e-2


@pytest.mark.parametrize("case", CASES)
def test_fp32_prefill_and_decode_equal_the_reference(case: str, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    graph = build_graph(fixtures / case, tmp_path, "fp32")
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < FP32_TOLERANCE
    assert distance(Decoder(graph).feed_one_by_one(reference["input_ids"]), reference["logits"]) < FP32_TOLERANCE


def test_prefill_in_two_pieces_crosses_the_sliding_window(fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / "phi3-window" / "reference.npz")
    ids, logits = reference["input_ids"], reference["logits"]
    decoder = Decoder(build_graph(fixtures / "phi3-window", tmp_path, "fp32"))
    # the window is 8: the second piece starts inside it and ends far past it
    pieces = np.concatenate([decoder.feed(ids[:, :5]), decoder.feed(ids[:, 5:])], axis=1)
    assert distance(pieces, logits) < FP32_TOLERANCE


@pytest.mark.parametrize("case", ["llama-gqa", "phi3-window", "phi3-gqa-partial"])
def test_fp16_stays_within_half_precision_of_the_reference(case: str, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    graph = build_graph(fixtures / case, tmp_path, "fp16")
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < FP16_TOLERANCE


@pytest.mark.parametrize("case", ["llama-gqa", "phi3-mha"])
def test_greedy_decoding_gives_the_reference_tokens(case: str, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    decoder = Decoder(build_graph(fixtures / case, tmp_path, "fp32"))
    prompt = reference["input_ids"][:, :8]
    logits, tokens = decoder.feed(prompt), []
    for _ in range(len(reference["greedy"])):
        tokens.append(int(logits[0, -1].argmax()))
        logits = decoder.feed(np.array([[tokens[-1]]]))
    assert tokens == reference["greedy"].tolist()


@pytest.mark.parametrize("case", ["llama-bias", "phi3-gqa-partial"])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_int8_is_close_to_the_reference_at_every_block_size(
    case: str, block_size: int, fixtures: Path, tmp_path: Path
) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    graph = build_graph(fixtures / case, tmp_path, "int8", block_size)
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < 0.2


def test_a_sharded_checkpoint_equals_the_same_checkpoint_in_one_file(fixtures: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shards = sorted((fixtures / "llama-gqa").glob("model-*.safetensors"))
    assert len(shards) == 2
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_bytes((fixtures / "llama-gqa" / "config.json").read_bytes())
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    save_file(tensors, whole / "model.safetensors")
    build_graph(fixtures / "llama-gqa", tmp_path / "a", "fp32")
    build_graph(whole, tmp_path / "b", "fp32")
    assert (tmp_path / "a/model.onnx.data").read_bytes() == (tmp_path / "b/model.onnx.data").read_bytes()
