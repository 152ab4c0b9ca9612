"""A GGUF file of a checkpoint exports to the graph of the checkpoint: transformers' logits, the same description."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.checkpoint.tensors import read_rows
from edgephi.export.families import describe
from tests.decoding import Decoder, build_graph, distance

LLAMA = ("llama-gqa", "llama-tied", "llama-bias", "llama3-rope", "llama-linear-rope")
PHI3 = ("phi3-mha", "phi3-window", "phi3-gqa-partial", "phi3-longrope-short", "phi3-longrope-long")
FP32_TOLERANCE = 1e-4  # of a logit's spread


def pairs_side_by_side(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's order of q and k rows: rows i and i + head_dim / 2 of a head become neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(rope: dict[str, float], head_dim: int) -> NDArray[np.float32]:
    """What the converter writes for llama3 scaling: from 1 (many turns in the old context) to `factor` (few)."""
    divisors = []
    for i in range(head_dim // 2):
        turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** (-2 * i / head_dim) / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / (kept + (1 - kept) / rope["factor"]))
    return np.array(divisors, np.float32)


def write_gguf(
    source: Path,
    path: Path,
    quantization: str = "F32",
    dequantized: bool = False,
    other_types: Mapping[str, str] | None = None,
) -> Path:
    """The fixture as llama.cpp's converter writes it: gguf-py's keys and tensor names, vectors in float32.

    `dequantized` stores what the quantized matrices mean, in float32; `other_types` are for tensors whose name holds
    the key.
    """
    config = json.loads((source / "config.json").read_text())
    rope = {"rope_theta": config.get("rope_theta")} | (
        config.get("rope_scaling") or config.get("rope_parameters") or {}
    )
    arch = config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kind = rope.get("rope_type") or rope.get("type")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if arch == "llama":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    else:
        original = config["original_max_position_embeddings"]
        writer.add_sliding_window(config["sliding_window"] or 0)
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, head_dim))
    elif kind == "longrope":
        stretch = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    for name, ref in open_folder(source).tensors.items():
        values = read_rows(ref, 0, ref.shape[0])
        if arch == "llama" and ".q_proj." in name:
            values = pairs_side_by_side(values, heads)
        elif arch == "llama" and ".k_proj." in name:
            values = pairs_side_by_side(values, kv_heads)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        other = [kind for part, kind in (other_types or {}).items() if part in theirs]
        qtype = gguf.GGMLQuantizationType[other[0] if other else quantization]
        if values.ndim == 1 or quantization == "F32":
            writer.add_tensor(theirs, values)
        elif dequantized:
            writer.add_tensor(theirs, gguf.quants.dequantize(gguf.quants.quantize(values, qtype), qtype))
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("case", LLAMA + PHI3)
def test_fp32_logits_equal_the_reference(case: str, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    checkpoint = open_gguf(write_gguf(fixtures / case, tmp_path / "model.gguf"))
    graph = build_graph(checkpoint, tmp_path / "fp32", "fp32")
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < FP32_TOLERANCE


@pytest.mark.parametrize("case", LLAMA + PHI3)
def test_the_metadata_describe_the_same_decoder(case: str, fixtures: Path, tmp_path: Path) -> None:
    expected = describe(open_folder(fixtures / case)).spec
    spec = describe(open_gguf(write_gguf(fixtures / case, tmp_path / "model.gguf"))).spec
    assert spec.norm_epsilon == pytest.approx(expected.norm_epsilon, rel=1e-6)
    np.testing.assert_allclose(spec.rope.inv_freq, expected.rope.inv_freq, rtol=1e-6)
    assert spec.rope.scale == pytest.approx(expected.rope.scale, rel=1e-6)
    assert (spec.long_rope is None) == (expected.long_rope is None)
    if spec.long_rope is not None and expected.long_rope is not None:
        assert spec.long_rope.switch == expected.long_rope.switch
        np.testing.assert_allclose(spec.long_rope.rope.inv_freq, expected.long_rope.rope.inv_freq, rtol=1e-6)
    same = {name: getattr(expected, name) for name in ("norm_epsilon", "rope", "long_rope")}
    assert replace(spec, **same) == expected


@pytest.mark.parametrize("case", ["llama-gqa", "phi3-window"])
@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_mean_what_the_gguf_package_says(
    case: str, quantization: str, fixtures: Path, tmp_path: Path
) -> None:
    stored = open_gguf(write_gguf(fixtures / case, tmp_path / "a.gguf", quantization))
    meant = open_gguf(write_gguf(fixtures / case, tmp_path / "b.gguf", quantization, dequantized=True))
    build_graph(stored, tmp_path / "a", "fp32")
    build_graph(meant, tmp_path / "b", "fp32")
    assert (tmp_path / "a/model.onnx.data").read_bytes() == (tmp_path / "b/model.onnx.data").read_bytes()
