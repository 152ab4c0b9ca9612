"""Decoders edgephi does not build itself: what `--via optimum` makes of them equals transformers.

Needs the extra `optimum`; every checkpoint is tiny, with random weights.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.errors import TokenizerError, UnsupportedModelError, UsageError, WeightError
from edgephi.quantize.formats import BlockFormat, dequantize
from edgephi.quantize.round_to_nearest import round_to_nearest
from tests.decoding import Decoder, build_graph, distance, genai_tokens
from tests.processes import wait_until

pytest.importorskip("optimum.exporters.onnx", reason='the extra is not installed: pip install -e ".[optimum]"')

FP32_TOLERANCE = 1e-4
# logits of float32 matrices multiplied in another order, behind 4-bit weights that are equal
SAME_WEIGHTS_TOLERANCE = 1e-4
# nats; random weights have nothing redundant, real ones lose less
INT4_DIVERGENCE = 0.15

# as wide as the MLP: shapes do not tell the head from a projection
VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 0,
}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS: dict[str, dict[str, object]] = {
    # tied embedding, biases on q, k, v; two query heads share a KV head
    "qwen2": SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e6},
    # LayerNorm, parallel block, a quarter of each head rotated, head of its own
    "gpt_neox": SIZES | {"rotary_pct": 0.25},
    # learned positions, weights stored [inputs, outputs]
    "gpt2": GPT2_SIZES | {"initializer_range": 0.15, "bos_token_id": None, "eos_token_id": 0},
    # a token sees itself and the 7 before it
    "mistral": SIZES | {"num_key_value_heads": 2, "sliding_window": 8},
}
FAMILIES = tuple(CONFIGS)
TOKENS = 40


def add_tokenizer(folder: Path) -> None:
    """96 tokens: 0 ends a text, the others are printable ASCII, so that every answer is a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = ["Ġ", *(chr(code) for code in range(33, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={text: n for n, text in enumerate(["<eos>", *printable])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_checkpoint(family: str, folder: Path, **changes: object) -> Path:
    """A published checkpoint of the family, but tiny and random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(CONFIGS.get(family, SIZES) | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at first, which would hide a bias that is left out
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def transformers_model(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(model: Any, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(token_ids)).logits.numpy())


class PositionedDecoder(Decoder):
    """A graph that is told the positions of its tokens."""

    def feed(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.inputs = {"position_ids": np.arange(self.length, self.length + token_ids.shape[1])[None]}
        return super().feed(token_ids)


@pytest.fixture(scope="module")
def token_ids() -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(1, VOCABULARY, (1, TOKENS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(family, tmp_path_factory.mktemp(family) / "checkpoint")
        return made[family]

    return get


@pytest.fixture(scope="module")
def bundle(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Bundles by family and precision, computing in float32."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, precision: Any) -> Path:
        if (family, precision) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{precision}") / "bundle"
            edgephi.export(checkpoint(family), folder, precision=precision, accuracy_level=1, via="optimum")
            made[family, precision] = folder
        return made[family, precision]

    return get


Checkpoints = Callable[[str], Path]
Bundles = Callable[[str, str], Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_equals_transformers_in_prefill_in_pieces_and_token_by_token(
    family: str, checkpoint: Checkpoints, bundle: Bundles, token_ids: NDArray[np.int64]
) -> None:
    reference = logits_of(transformers_model(checkpoint(family)), token_ids)
    graph = bundle(family, "fp32") / "model.onnx"
    assert distance(PositionedDecoder(graph).feed(token_ids), reference) < FP32_TOLERANCE
    assert distance(PositionedDecoder(graph).feed_one_by_one(token_ids), reference) < FP32_TOLERANCE
    decoder = PositionedDecoder(graph)
    pieces = np.concatenate([decoder.feed(token_ids[:, :5]), decoder.feed(token_ids[:, 5:])], axis=1)
    assert distance(pieces, reference) < FP32_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_equals_transformers_with_the_same_rounded_weights(
    family: str, checkpoint: Checkpoints, bundle: Bundles, token_ids: NDArray[np.int64]
) -> None:
    model = transformers_model(checkpoint(family))
    exact = logits_of(model, token_ids)
    _round_weights(model)
    rounded = logits_of(model, token_ids)
    ours = PositionedDecoder(bundle(family, "int4") / "model.onnx").feed(token_ids)
    assert distance(ours, rounded) < SAME_WEIGHTS_TOLERANCE
    assert distance(rounded, exact) > 1000 * SAME_WEIGHTS_TOLERANCE
    assert _divergence(exact, ours) < INT4_DIVERGENCE


def _round_weights(model: Any) -> None:
    """int8 embedding and head, int4 linear layers, each rounded as [outputs, inputs]."""
    import torch

    eight, four = BlockFormat(8, 32, symmetric=True), BlockFormat(4, 32, symmetric=False)
    ends = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    seen = set[int]()
    for module in model.modules():
        kind = type(module).__name__
        weightless = kind not in ("Linear", "Conv1D") and id(module) not in ends
        if weightless or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        turned = kind == "Conv1D"
        values = module.weight.detach().numpy()
        values = np.ascontiguousarray(values.T if turned else values)
        rounded = dequantize(round_to_nearest(values, eight if id(module) in ends else four))
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(np.ascontiguousarray(rounded.T if turned else rounded)))


def _divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Mean KL divergence of the next token's distribution, nats."""
    p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) for x in (reference, logits))
    p, q = p - reference.max(-1, keepdims=True), q - logits.max(-1, keepdims=True)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_onnxruntime_genai_decodes_as_transformers_does(
    family: str, checkpoint: Checkpoints, bundle: Bundles, token_ids: NDArray[np.int64]
) -> None:
    model, expected = transformers_model(checkpoint(family)), token_ids[:, :12]
    for _ in range(8):
        following = logits_of(model, expected)[:, -1].argmax(-1)
        expected = np.concatenate([expected, following[:, None]], axis=1)
    assert genai_tokens(bundle(family, "fp32"), token_ids[0, :12], 64, 8) == expected[0, 12:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_int4_bundle_answers_in_edgephi_and_in_stock_onnxruntime_genai(family: str, bundle: Bundles) -> None:
    import onnxruntime_genai as og
    from tokenizers import Tokenizer

    folder = bundle(family, "int4")
    with edgephi.load(folder, threads=1) as loaded:
        ours = "".join(loaded.generate("The capital of France", max_new_tokens=12))
    prompt = og.Tokenizer(og.Model(str(folder))).encode("The capital of France")
    tokens = genai_tokens(folder, prompt, len(prompt) + 12)
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens)
    assert ours == theirs != ""


def test_the_manifest_says_who_built_the_graph_and_how_weights_are_stored(bundle: Bundles) -> None:
    from edgephi.bundle import check_bundle, read_manifest

    manifest = read_manifest(bundle("qwen2", "int4"))
    assert (manifest.exporter, manifest.model.family) == ("optimum", "qwen2")
    assert (manifest.model.kv_heads, manifest.model.head_dim, manifest.model.tied_embedding) == (2, 16, True)
    assert {"optimum", "optimum-onnx", "transformers", "torch"} <= manifest.versions.keys()
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    assert {group.weights: (group.bits, group.parameters) for group in manifest.recipe.weights} == {
        "embedding": (8, VOCABULARY * 64),
        "linear": (4, 2 * layer),
    }
    check_bundle(bundle("qwen2", "int4"), manifest, every_byte=True)


def test_nothing_but_the_bundle_is_left(bundle: Bundles) -> None:
    folder = bundle("gpt_neox", "int4")
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
    assert {path.name for path in folder.iterdir()} == {
        "edgephi.json",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_what_a_killed_export_leaves_is_gone_after_the_next(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, output = checkpoint("qwen2"), tmp_path / "bundle"
    call = f"import edgephi; edgephi.export({str(source)!r}, {str(output)!r}, precision='fp32', via='optimum')"
    process = subprocess.Popen([sys.executable, "-c", call])
    wait_until(lambda: any(tmp_path.rglob("*traced-*/model.onnx")), process)
    process.kill()
    process.wait()
    assert any(tmp_path.iterdir()) and not output.exists()
    edgephi.export(source, output, precision="fp32", via="optimum")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("case", ["llama-gqa", "llama3-rope", "phi3-gqa-partial"])
def test_optimum_and_edgephi_build_the_same_model(case: str, fixtures: Path, tmp_path: Path) -> None:
    """Two exporters that share no code; config.json is in transformers 5's words, which the extra's does not know."""
    source = shutil.copytree(fixtures / case, tmp_path / "checkpoint")
    add_tokenizer(source)
    edgephi.export(source, tmp_path / "bundle", precision="fp32", via="optimum")
    reference = np.load(fixtures / case / "reference.npz")
    theirs = PositionedDecoder(tmp_path / "bundle" / "model.onnx").feed(reference["input_ids"])
    ours = Decoder(build_graph(fixtures / case, tmp_path / "own", "fp32")).feed(reference["input_ids"])
    assert distance(ours, theirs) < FP32_TOLERANCE
    assert distance(theirs, reference["logits"]) < FP32_TOLERANCE


# --- what is refused


def test_a_missing_tensor_is_an_error_and_not_a_random_weight(checkpoint: Checkpoints, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = shutil.copytree(checkpoint("qwen2"), tmp_path / "qwen2")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        edgephi.export(source, tmp_path / "bundle", via="optimum")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen2"]


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint("qwen2", tmp_path / "small", vocab_size=64)
    with pytest.raises(TokenizerError, match="96 tokens, the embedding has 64"):
        edgephi.export(source, tmp_path / "bundle", via="optimum")


def test_a_rope_that_changes_with_length_is_refused(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    source = make_checkpoint("qwen2", tmp_path / "dynamic", rope_scaling=scaling)
    with pytest.raises(UnsupportedModelError, match="rope type 'dynamic'"):
        edgephi.export(source, tmp_path / "bundle", via="optimum")


def test_transformers_5_words_that_transformers_4_would_ignore_are_refused(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint("gpt_neox"), tmp_path / "gpt_neox")
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_theta", "partial_rotary_factor"):  # stated twice and differently they would be refused for that
        config.pop(key)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"rope_parameters is .* cannot express for 'gpt_neox'"):
        edgephi.export(source, tmp_path / "bundle", via="optimum")


def test_a_model_that_optimum_does_not_export_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint("biogpt", tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match="model_type is 'biogpt', which optimum-onnx does not export"):
        edgephi.export(source, tmp_path / "bundle", via="optimum")


def test_code_of_the_checkpoint_is_never_run(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint("qwen2"), tmp_path / "custom")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UnsupportedModelError, match="transformers does not have the model"):
        edgephi.export(source, tmp_path / "bundle", via="optimum")
    assert not (tmp_path / "ran").exists()


def test_float16_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="computes in float32"):
        edgephi.export(checkpoint("qwen2"), tmp_path / "bundle", precision="fp16", via="optimum")
