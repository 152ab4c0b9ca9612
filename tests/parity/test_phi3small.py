"""Phi-3-small equals a NumPy forward pass written from its description, however its tokens are fed."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.config import Config as Settings
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe, expected_tensors
from edgephi.export.families.phi3small import read_config
from edgephi.export.families.published import PUBLISHED
from edgephi.export.graph.block_sparse import prefill_chunk
from edgephi.export.graph.genai_config import write_genai_config
from edgephi.export.spec import LongRope
from edgephi.export.tokenizer.files import TokenizerFiles
from tests.decoding import Decoder, build_graph, distance
from tests.parity.reference_phi3small import Config, Weights, forward, random_weights

FP32_TOLERANCE, FP16_TOLERANCE = 1e-4, 3e-2
LENGTH = 50
"""Twelve blocks of 4 and a half: both the local blocks and several strides are left behind."""

BASE: Config = {
    "architectures": ["Phi3SmallForCausalLM"],
    "model_type": "phi3small",
    "hidden_size": 64,
    "ff_dim_multiplier": None,
    "ff_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "hidden_act": "gegelu",
    "gegelu_limit": 1.5,
    "layer_norm_epsilon": 1e-2,
    "rope_embedding_base": 1000,
    "rope_position_scale": 1.0,
    "mup_attn_multiplier": 2.0,
    "mup_embedding_multiplier": 10.0,
    "mup_use_scaling": True,
    "mup_width_multiplier": 0.5,
    "blocksparse_block_size": 4,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 2,
    "blocksparse_triton_kernel_block_size": 4,
    "blocksparse_vert_stride": 3,
    "dense_attention_every_n_layers": 2,
    "dummy_token_indices": [0, 5, 95],
}
CASES: dict[str, Config] = {
    "a stride that does not divide the heads": BASE,
    "heads that share patterns": {**BASE, "blocksparse_vert_stride": 2},
    "a stride beyond the heads": {**BASE, "blocksparse_vert_stride": 8, "blocksparse_num_local_blocks": 1},
    "one pattern for all heads": {**BASE, "blocksparse_homo_head_pattern": True},
    "no dense layer": {**BASE, "dense_attention_every_n_layers": None, "num_hidden_layers": 2},
    "dense layers only": {**BASE, "dense_attention_every_n_layers": 1, "num_hidden_layers": 2},
    "ordinary attention scale": {**BASE, "mup_use_scaling": False, "num_hidden_layers": 2},
}
WRONG_READINGS: dict[str, Config] = {
    "every layer is dense": {"dense_attention_every_n_layers": 1},
    "every layer is sparse": {"dense_attention_every_n_layers": None},
    "three layers of four are sparse": {"dense_attention_every_n_layers": 4},
    "all heads have the first one's pattern": {"blocksparse_homo_head_pattern": True},
    "one local block more": {"blocksparse_num_local_blocks": 3},
    "another stride": {"blocksparse_vert_stride": 4},
    "another block size": {"blocksparse_block_size": 8},
    "no clamping": {"gegelu_limit": 1e9},
    "ordinary attention scale": {"mup_use_scaling": False},
    "no embedding scale": {"mup_embedding_multiplier": 1.0},
    "no logit scale": {"mup_width_multiplier": 1.0},
    "another rotary base": {"rope_embedding_base": 10000},
    "another epsilon": {"layer_norm_epsilon": 1e-5},
}


def write_checkpoint(config: Config, weights: Weights, folder: Path) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def token_ids(config: Config, length: int = LENGTH) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, config["vocab_size"], (1, length))


def used(config: Config, logits: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float32]:
    """The logits of tokens that are not suppressed."""
    return np.delete(logits, config["dummy_token_indices"], axis=-1).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_fp32_prefill_pieces_and_decode_equal_the_reference(case: str, tmp_path: Path) -> None:
    config = CASES[case]
    weights, ids = random_weights(config, 0), token_ids(config)
    reference = used(config, forward(config, weights, ids[0])[None])
    graph = build_graph(write_checkpoint(config, weights, tmp_path / "source"), tmp_path / "graph", "fp32")
    pieces = Decoder(graph)
    fed = np.concatenate([pieces.feed(ids[:, start:stop]) for start, stop in ((0, 7), (7, 30), (30, LENGTH))], axis=1)
    for logits in (Decoder(graph).feed(ids), Decoder(graph).feed_one_by_one(ids), fed):
        assert distance(used(config, logits), reference) < FP32_TOLERANCE


@pytest.mark.parametrize("reading", WRONG_READINGS)
def test_the_comparison_would_notice(reading: str) -> None:
    weights, ids = random_weights(BASE, 0), token_ids(BASE)[0]
    right, wrong = forward(BASE, weights, ids), forward(BASE | WRONG_READINGS[reading], weights, ids)
    assert distance(used(BASE, wrong), used(BASE, right)) > 100 * FP32_TOLERANCE


def test_suppressed_tokens_have_the_lowest_logit_there_is(tmp_path: Path) -> None:
    source = write_checkpoint(BASE, random_weights(BASE, 0), tmp_path / "source")
    logits = Decoder(build_graph(source, tmp_path / "graph", "fp32")).feed(token_ids(BASE))
    assert (logits[..., BASE["dummy_token_indices"]] == np.finfo(np.float32).min).all()
    assert np.abs(used(BASE, logits)).max() < 1e3


def test_a_cache_shared_between_past_and_present_gives_the_same(tmp_path: Path) -> None:
    weights, ids = random_weights(BASE, 0), token_ids(BASE)
    source = write_checkpoint(BASE, weights, tmp_path / "source")
    session = Decoder(build_graph(source, tmp_path / "graph", "fp32")).session
    shape = (1, BASE["num_key_value_heads"], 64, 16)
    names = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name in names}
    logits = []
    for start, stop in ((0, 20), (20, 21), (21, 22), (22, LENGTH)):
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids[:, start:stop])
        binding.bind_cpu_input("attention_mask", np.ones((1, stop), np.int64))
        binding.bind_output("logits")
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        session.run_with_iobinding(binding)
        logits.append(binding.get_outputs()[0].numpy())
    reference = used(BASE, forward(BASE, weights, ids[0])[None])
    assert distance(used(BASE, np.concatenate(logits, axis=1)), reference) < FP32_TOLERANCE


def test_sequences_of_different_lengths_keep_their_own_blocks(tmp_path: Path) -> None:
    weights, ids = random_weights(BASE, 0), np.concatenate([token_ids(BASE), token_ids(BASE)[:, ::-1]])
    source = write_checkpoint(BASE, weights, tmp_path / "source")
    decoder = Decoder(build_graph(source, tmp_path / "graph", "fp32"))
    references = [used(BASE, forward(BASE, weights, row)) for row in ids]
    # the second sequence is five tokens shorter, padded behind; then each goes on by one token
    prompt, mask = ids[:, :40].copy(), np.ones((2, 40), np.int64)
    prompt[1, 35:], mask[1, 35:] = 1, 0
    past = {name: np.zeros((2, *value.shape[1:]), np.float32) for name, value in decoder.past.items()}
    first, *cache = decoder.session.run(None, {"input_ids": prompt, "attention_mask": mask, **past})
    following = {"input_ids": np.array([[ids[0, 40]], [ids[1, 35]]])}
    longer = np.concatenate([np.ones((2, 1), np.int64), mask], axis=1)
    second, *_ = decoder.session.run(
        None, {**following, "attention_mask": longer, **dict(zip(past, cache, strict=True))}
    )
    for row, length in ((0, 40), (1, 35)):
        reference = references[row]
        assert distance(used(BASE, first[row, :length]), reference[:length]) < FP32_TOLERANCE
        assert distance(used(BASE, second[row]), reference[length : length + 1]) < FP32_TOLERANCE


def test_longrope_takes_the_factors_of_the_whole_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    scaling = {
        "type": "su",
        "short_factor": rng.uniform(1, 1.5, 8).tolist(),
        "long_factor": rng.uniform(2, 8, 8).tolist(),
        "short_mscale": 1.1,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 32,
    }
    config = {**BASE, "rope_scaling": scaling, "original_max_position_embeddings": 32}
    weights = random_weights(config, 0)
    graph = build_graph(write_checkpoint(config, weights, tmp_path / "source"), tmp_path / "graph", "fp32")
    for length in (32, LENGTH):
        ids = token_ids(config, length)
        reference = used(config, forward(config, weights, ids[0])[None])
        assert distance(used(config, Decoder(graph).feed(ids)), reference) < FP32_TOLERANCE


def test_two_original_lengths_are_refused() -> None:
    """The published code reads the one in the section, other programs the one at the top level."""
    scaling = {
        "type": "su",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32,
    }
    config = {**BASE, "rope_scaling": scaling, "original_max_position_embeddings": 16}
    with pytest.raises(UnsupportedModelError, match="original_max_position_embeddings is 16: in"):
        read_config(Settings(config, "config.json"))


def test_fp16_stays_within_half_precision_of_the_reference(tmp_path: Path) -> None:
    weights, ids = random_weights(BASE, 0), token_ids(BASE)
    graph = build_graph(write_checkpoint(BASE, weights, tmp_path / "source"), tmp_path / "graph", "fp16")
    reference = used(BASE, forward(BASE, weights, ids[0])[None])
    assert distance(used(BASE, Decoder(graph).feed(ids)), reference) < FP16_TOLERANCE


def test_int8_is_close_to_the_reference(tmp_path: Path) -> None:
    weights, ids = random_weights(BASE, 0), token_ids(BASE)
    graph = build_graph(write_checkpoint(BASE, weights, tmp_path / "source"), tmp_path / "graph", "int8", 16)
    reference = used(BASE, forward(BASE, weights, ids[0])[None])
    assert distance(used(BASE, Decoder(graph).feed(ids)), reference) < 0.2


def test_heads_with_the_same_pattern_share_it(tmp_path: Path) -> None:
    published = {
        **BASE,
        "hidden_size": 512,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 1,
    }
    published |= {"blocksparse_vert_stride": 8, "dense_attention_every_n_layers": 2}
    source = write_checkpoint(published, random_weights(published, 0), tmp_path / "source")
    sparse = describe(open_folder(source)).spec.block_sparse
    assert sparse is not None and sparse.shifts == tuple(range(8))


def test_the_published_configuration_is_read_as_described() -> None:
    spec = read_config(Settings(PUBLISHED["microsoft/Phi-3-small-8k-instruct"], "config.json"))
    sparse = spec.block_sparse
    assert sparse is not None and (sparse.block_size, sparse.local_blocks, sparse.stride) == (64, 16, 8)
    assert [layer for layer in range(spec.layers) if not sparse.covers(layer)] == list(range(1, 32, 2))
    # softmax scale 1 / head_dim, logits an eighth, as many unused tokens as the tokenizer has dummies and fillers
    assert (spec.attention_scale, spec.head_scale, spec.embedding_scale) == (1 / 128, 1 / 8, 10.0)
    assert len(spec.suppressed_tokens) == 91 and spec.tied_embedding
    assert not {100257, 100261, 100262, 100263, 100266} & set(spec.suppressed_tokens)
    # 7.39 B: the model card's 7B
    assert sum(map(prod, expected_tensors(PUBLISHED["microsoft/Phi-3-small-8k-instruct"]).values())) == 7_392_272_384


def test_long_prompts_are_computed_in_pieces_unless_the_rope_forbids_it() -> None:
    spec = read_config(Settings(BASE, "config.json"))
    assert prefill_chunk(spec) == 512
    assert prefill_chunk(replace(spec, long_rope=LongRope(32, spec.rope))) is None
    assert prefill_chunk(replace(spec, block_sparse=None)) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "silu"),
        ("ff_dim_multiplier", 4),
        ("rope_position_scale", 2.0),
        ("rope_scaling", {"type": "yarn"}),
        ("mup_width_multiplier", 0),
        ("mup_use_scaling", "yes"),
        ("blocksparse_block_size", 0),
        ("blocksparse_vert_stride", None),
        ("dense_attention_every_n_layers", 0),
        ("dummy_token_indices", [96]),
        ("dummy_token_indices", {}),
        ("dummy_token_indices", None),
    ],
)
def test_anything_else_is_refused_by_its_key(key: str, value: object) -> None:
    named = {"dummy_token_indices": "vocab_size"}.get(key, key) if value is None else key
    with pytest.raises(UnsupportedModelError, match="type" if key == "rope_scaling" else named):
        read_config(Settings({**BASE, key: value}, "config.json"))


@pytest.mark.parametrize("chunk", [None, 16])
def test_onnxruntime_genai_decodes_the_reference_tokens(chunk: int | None, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    weights, ids = random_weights(BASE, 0), token_ids(BASE)[0]
    source = write_checkpoint(BASE, weights, tmp_path / "source")
    folder = build_graph(source, tmp_path / "graph", "fp32").parent
    tokenizer = TokenizerFiles("{}", {}, None, None, (0,), 0, BASE["vocab_size"])
    write_genai_config(describe(open_folder(source)).spec, tokenizer, folder, prefill_chunk=chunk)
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=LENGTH + 4)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids.astype(np.int32))
    logits = used(BASE, np.asarray(generator.get_output("logits")))[0, -1]
    assert distance(logits, used(BASE, forward(BASE, weights, ids))[-1]) < FP32_TOLERANCE
    while not generator.is_done():
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        assert token == forward(BASE, weights, ids)[-1].argmax()
        ids = np.append(ids, token)
    assert len(ids) == LENGTH + 4
