"""phi-1, phi-1.5 and phi-2: exported graphs equal transformers' PhiForCausalLM, from safetensors and from GGUF."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgephi.errors import UnsupportedModelError, WeightError
from edgephi.export.checkpoint.config import Config
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import check_rotary, describe, expected_tensors, phi
from edgephi.export.families.published import PUBLISHED
from edgephi.export.graph.genai_config import write_genai_config
from edgephi.export.tokenizer.files import TokenizerFiles
from tests.decoding import Decoder, build_graph, distance, genai_tokens
from tests.quantized import EIGHT, fake_quantized, four, rms_distance

CASES = ("phi-parallel", "phi-qk")
FP32_TOLERANCE = 1e-4  # of a logit's spread


def edited(source: Path, folder: Path, **changes: object) -> Path:
    """The same weights with other values in config.json."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | changes))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_fp32_prefill_and_decode_equal_the_reference(case: str, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    graph = build_graph(fixtures / case, tmp_path, "fp32")
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < FP32_TOLERANCE
    assert distance(Decoder(graph).feed_one_by_one(reference["input_ids"]), reference["logits"]) < FP32_TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_fp16_stays_within_half_precision_of_the_reference(case: str, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    graph = build_graph(fixtures / case, tmp_path, "fp16")
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < 3e-2


@pytest.mark.parametrize("case", CASES)
def test_int4_runs_and_stays_near_the_reference(case: str, fixtures: Path, tmp_path: Path) -> None:
    """Random weights are 4 bits' worst case; a wrong nibble order, scale or bias moves logits by a whole spread."""
    reference = np.load(fixtures / case / "reference.npz")
    logits = Decoder(build_graph(fixtures / case, tmp_path, "int4", 16)).feed(reference["input_ids"])
    assert np.isfinite(logits).all()
    assert rms_distance(logits, reference["logits"]) < 0.15


@pytest.mark.parametrize("block_size", [16, 32])
def test_int4_computes_exactly_what_its_codes_decode_to(block_size: int, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "phi-parallel"
    ids = np.load(source / "reference.npz")["input_ids"]
    eight = ("model.embed_tokens.weight", "lm_head.weight")
    decoded = fake_quantized(source, tmp_path / "decoded", lambda name: EIGHT if name in eight else four(block_size))
    expected = Decoder(build_graph(decoded, tmp_path / "fp32", "fp32")).feed(ids)
    logits = Decoder(build_graph(source, tmp_path / "int4", "int4", block_size)).feed(ids)
    assert distance(logits, expected) < FP32_TOLERANCE


def test_the_epsilon_comes_from_the_familys_own_key(fixtures: Path, tmp_path: Path) -> None:
    """rms_norm_eps is another family's key: it changes nothing here, and layer_norm_eps shows in the logits."""
    source = fixtures / "phi-parallel"
    reference = np.load(source / "reference.npz")
    ids, logits = reference["input_ids"], reference["logits"]
    decoy = edited(source, tmp_path / "decoy", rms_norm_eps=0.5)
    assert distance(Decoder(build_graph(decoy, tmp_path / "a", "fp32")).feed(ids), logits) < FP32_TOLERANCE
    other = edited(source, tmp_path / "other", layer_norm_eps=1e-5)
    assert rms_distance(Decoder(build_graph(other, tmp_path / "b", "fp32")).feed(ids), logits) > 0.002


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_layernorm", True),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("partial_rotary_factor", 0.25),  # 8 of 32 channels
        ("partial_rotary_factor", 1.5),
        ("num_key_value_heads", 3),
    ],
)
def test_what_is_not_built_is_refused_by_name(key: str, value: object, fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        describe(open_folder(edited(fixtures / "phi-parallel", tmp_path / "checkpoint", **{key: value})))
    told = str(caught.value)
    assert key in told or (isinstance(value, dict) and str(value["type"]) in told)


def test_head_sizes_that_the_attention_operator_rejects_are_refused_before_anything_is_written() -> None:
    """A model with heads of 24 channels would be exported, and fail in the user's first prompt."""
    spec = phi.read_config(
        Config(
            {
                "hidden_size": 48,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "intermediate_size": 64,
                "vocab_size": 64,
                "max_position_embeddings": 64,
                "partial_rotary_factor": 1.0,
            },
            "config.json",
        )
    )
    assert spec.head_dim == 24
    with pytest.raises(UnsupportedModelError, match="head_dim is 24"):
        check_rotary(spec, "config.json")


def test_a_checkpoint_without_the_rotary_key_rotates_half_of_a_head() -> None:
    """PhiConfig's default; phi-1's first config.json left the key out."""
    sizes = {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    assert phi.read_config(Config(sizes, "config.json")).rope.dim == 32
    assert phi.read_config(Config(sizes | {"rope_parameters": {"rope_theta": 10000.0}}, "config.json")).rope.dim == 32


@pytest.mark.parametrize(
    ("name", "billions", "rotated"),
    # sizes as the hub states them
    [("phi-1", 1.42, 32), ("phi-1_5", 1.42, 32), ("phi-2", 2.78, 32)],
)
def test_the_published_configurations_are_read(name: str, billions: float, rotated: int) -> None:
    published = PUBLISHED[f"microsoft/{name}"]
    assert sum(prod(shape) for shape in expected_tensors(published).values()) / 1e9 == pytest.approx(billions, abs=5e-3)
    assert phi.read_config(Config(published, name)).rope.dim == rotated


# --- GGUF

BLOCK = {"attn_norm": "input_layernorm", "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head"}


def write_gguf(
    source: Path,
    path: Path,
    *,
    fused: bool,
    epsilon: bool = True,
    quantization: str | None = None,
    dequantized: bool = False,
) -> Path:
    """The fixture as llama.cpp's converter writes it: gguf-py's names of MODEL_ARCH.PHI2, vectors in float32.

    `dequantized` stores what the quantized matrices mean, in float32.
    """
    import gguf

    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config["num_key_value_heads"] or heads
    writer = gguf.GGUFWriter(path, "phi2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if epsilon:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    rotated = config.get("partial_rotary_factor") or config["rope_parameters"]["partial_rotary_factor"]
    writer.add_rope_dimension_count(int(rotated * hidden) // heads)

    def add(name: str, values: np.ndarray) -> None:
        if values.ndim == 1 or quantization is None:
            writer.add_tensor(name, values.astype(np.float32) if values.ndim == 1 else values)
            return
        qtype = gguf.GGMLQuantizationType[quantization]
        packed = gguf.quants.quantize(values.astype(np.float32), qtype)
        if dequantized:
            writer.add_tensor(name, gguf.quants.dequantize(packed, qtype))
        else:
            writer.add_tensor(name, packed, raw_dtype=qtype)

    for kind in ("weight", "bias"):
        for ours, theirs in TOP.items():
            if f"{theirs}.{kind}" in tensors:
                add(f"{ours}.{kind}", tensors[f"{theirs}.{kind}"])
        for layer in range(config["num_hidden_layers"]):
            for ours, theirs in BLOCK.items():
                add(f"blk.{layer}.{ours}.{kind}", tensors[f"model.layers.{layer}.{theirs}.{kind}"])
            parts = [tensors[f"model.layers.{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            if fused:
                add(f"blk.{layer}.attn_qkv.{kind}", np.concatenate(parts))
            else:
                for letter, part in zip("qkv", parts, strict=True):
                    add(f"blk.{layer}.attn_{letter}.{kind}", part)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fused", [True, False])
def test_gguf_phi2_equals_the_reference(case: str, fused: bool, fixtures: Path, tmp_path: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    checkpoint = open_gguf(write_gguf(fixtures / case, tmp_path / "model.gguf", fused=fused))
    graph = build_graph(checkpoint, tmp_path, "fp32")
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < FP32_TOLERANCE


def test_gguf_phi2_without_its_epsilon_is_refused(fixtures: Path, tmp_path: Path) -> None:
    file = write_gguf(fixtures / "phi-parallel", tmp_path / "model.gguf", fused=True, epsilon=False)
    with pytest.raises(UnsupportedModelError, match="layer_norm_epsilon"):
        open_gguf(file)


def test_gguf_phi2_with_fused_rows_that_fit_no_split_is_refused(fixtures: Path, tmp_path: Path) -> None:
    import gguf

    file = write_gguf(fixtures / "phi-qk", tmp_path / "model.gguf", fused=True)
    data = bytearray(file.read_bytes())
    # claim as many KV heads as heads: q, k and v would then have 3 x 64 rows, the tensor has 128
    key = b"phi2.attention.head_count_kv"
    at = data.index(key) + len(key)
    assert data[at : at + 4] == int(gguf.GGUFValueType.UINT32).to_bytes(4, "little")
    data[at + 4 : at + 8] = (4).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(WeightError, match="attn_qkv"):
        open_gguf(file)


# --- onnxruntime-genai

# transformers 5.23.0, PhiForCausalLM in float32: the greedy continuation of the fixture's first 8 ids, a whole forward
# for each token; the winner leads by 0.048 standard deviations of the logits or more
GREEDY = (60, 130, 129, 32, 60, 130, 129, 32, 60, 130, 67, 130)


def test_stock_onnxruntime_genai_gives_the_reference_greedy_tokens(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "phi-parallel"
    build_graph(source, tmp_path, "fp32")
    # the ids that end an answer and pad a batch are the tokenizer's to say, and these checkpoints have none
    tokenizer = TokenizerFiles("{}", {}, None, None, (159,), 159, 160)
    write_genai_config(describe(open_folder(source)).spec, tokenizer, tmp_path)
    prompt = np.load(source / "reference.npz")["input_ids"][0, :8]
    assert tuple(genai_tokens(tmp_path, prompt, 20)) == GREEDY
