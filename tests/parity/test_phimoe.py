"""Phi-3.5-MoE: exported graphs equal transformers' PhimoeForCausalLM, and QMoE computes what its codes decode to.

The fixture stays within its rope's original length; `test_longrope.py` looks beyond.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgephi.errors import UnsupportedModelError, UsageError, WeightError
from edgephi.export.checkpoint.config import Config
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe, expected_tensors, phimoe
from edgephi.export.families.published import PUBLISHED
from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.graph.genai_config import write_genai_config
from edgephi.export.graph.moe import sparse_mixer
from edgephi.export.spec import Experts
from edgephi.export.tokenizer.files import TokenizerFiles
from edgephi.export.weights.layout import Layout, plan_storage
from edgephi.export.weights.recipe import expert_format, make_recipe
from edgephi.quantize.formats import BlockFormat
from tests.decoding import Decoder, build_graph, distance, genai_tokens
from tests.quantized import EIGHT, fake_quantized, four, rms_distance

FP32_TOLERANCE = 1e-4  # of a logit's spread


@pytest.fixture
def source(fixtures: Path) -> Path:
    return fixtures / "phimoe"


@pytest.fixture
def reference(source: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    arrays = np.load(source / "reference.npz")
    return arrays["input_ids"], arrays["logits"]


Reference = tuple[NDArray[np.int64], NDArray[np.float32]]


def edited(source: Path, folder: Path, **changes: object) -> Path:
    """The same weights with other values in config.json; a tensor under its name replaces the stored one."""
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return folder


def format_of(block_size: int, name: str) -> BlockFormat | None:
    """The int4 recipe: the router is not quantized, and blocks of experts divide their 48 channels."""
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return EIGHT
    if name.endswith("block_sparse_moe.gate.weight"):
        return None
    return four(16 if ".experts." in name else block_size)


def test_fp32_prefill_and_decode_equal_the_reference(source: Path, reference: Reference, tmp_path: Path) -> None:
    ids, logits = reference
    graph = build_graph(source, tmp_path, "fp32")
    assert distance(Decoder(graph).feed(ids), logits) < FP32_TOLERANCE
    assert distance(Decoder(graph).feed_one_by_one(ids), logits) < FP32_TOLERANCE


def test_fp16_stays_within_half_precision_of_the_reference(source: Path, reference: Reference, tmp_path: Path) -> None:
    ids, logits = reference
    assert distance(Decoder(build_graph(source, tmp_path, "fp16")).feed(ids), logits) < 3e-2


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_int4_computes_exactly_what_its_codes_decode_to(
    block_size: int, source: Path, reference: Reference, tmp_path: Path
) -> None:
    """Prefill and decode, where the operator takes other paths; a nibble, scale, gate or expert out of order shows."""
    ids, _ = reference
    decoded = fake_quantized(source, tmp_path / "decoded", lambda name: format_of(block_size, name))
    expected = Decoder(build_graph(decoded, tmp_path / "fp32", "fp32")).feed(ids)
    graph = build_graph(source, tmp_path / "int4", "int4", block_size)
    assert distance(Decoder(graph).feed(ids), expected) < FP32_TOLERANCE
    assert distance(Decoder(graph).feed_one_by_one(ids), expected) < FP32_TOLERANCE


def test_int8_is_close_to_the_reference(source: Path, reference: Reference, tmp_path: Path) -> None:
    """Not exactly what its codes decode to: QMoE rounds activations to 8 bits at every accuracy level."""
    ids, logits = reference
    assert rms_distance(Decoder(build_graph(source, tmp_path, "int8")).feed(ids), logits) < 0.05


def test_int4_stays_near_the_reference(source: Path, reference: Reference, tmp_path: Path) -> None:
    """Four bits of random weights turn some choices of experts around, hence the median over positions.

    Gate and up swapped move it to 1.0, experts in another order to 1.2.
    """
    ids, logits = reference
    ours = Decoder(build_graph(source, tmp_path, "int4", 16)).feed(ids)
    assert np.isfinite(ours).all()
    errors = np.sqrt(np.mean((ours - logits) ** 2, axis=-1)) / logits.std(axis=-1)
    assert np.median(errors) < 0.45


# --- the mixer


def mixer_by_the_book(scores: NDArray[np.float32], jitter: float) -> NDArray[np.float32]:
    """transformers' sparsemixer outside of training, one token at a time, as weights [tokens, experts]."""
    weights = np.zeros_like(scores)
    for row, out in zip(scores.astype(np.float64), weights, strict=True):
        candidates = dict(enumerate(row))
        for _ in range(2):
            best = max(candidates, key=lambda e: candidates[e])
            top = candidates[best]
            near = [e for e in candidates if (top - row[e]) <= 2 * jitter * max(abs(row[e]), top)]
            out[best] = 1 / sum(np.exp(row[e] - top) for e in near)
            del candidates[best]
    return weights


@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.4])
def test_the_mixer_gives_the_two_weights_of_the_paper(jitter: float) -> None:
    import onnx_ir as ir
    import onnxruntime as ort

    emit = GraphBuilder(Layout({}, {}, 0), make_recipe("fp32", 32))
    scores = emit.port("scores", [1, "tokens", 16])
    weights = sparse_mixer(emit, Experts(16, jitter), "/mixer", scores)
    weights.name, weights.type, weights.shape = "weights", scores.type, scores.shape
    graph = ir.Graph([scores], [weights], nodes=emit.nodes, initializers=list(emit.initializers.values()))
    graph.opset_imports[""] = 21
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])

    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((400, 16)).astype(np.float32)
    drawn[100:200] = drawn[100:200] * 0.1 - 4  # all negative
    drawn[200:300] = drawn[200:300] * 0.05 + 2  # close together
    (given,) = session.run(None, {"scores": drawn[None]})
    expected = mixer_by_the_book(drawn, jitter)
    assert ((given[0] > 0).sum(axis=-1) == 2).all()
    np.testing.assert_allclose(given[0], expected, atol=1e-6)


# --- storage


def test_experts_lie_one_after_another_in_their_stack(source: Path) -> None:
    architecture = describe(open_folder(source))
    layout = plan_storage(architecture, make_recipe("int4", 32))
    for module in ("gate_up", "down"):
        stack = layout.stacks[f"layers.1.experts.{module}.weight"]
        members = [layout.matrices[f"layers.1.experts.{expert}.{module}.weight"] for expert in range(4)]
        for whole, parts in zip(stack.tensors, zip(*(m.tensors for m in members), strict=True), strict=True):
            assert [part.offset - whole.offset for part in parts] == [i * whole.bytes // 4 for i in range(4)]
            assert sum(part.bytes for part in parts) == whole.bytes
    taken = {tensor.offset: tensor.bytes for m in layout.matrices.values() for tensor in m.tensors}
    taken |= {tensor.offset: tensor.bytes for tensor in layout.vectors.values()}
    ends = [offset + size for offset, size in sorted(taken.items())]
    assert all(end <= start for end, start in zip(ends, sorted(taken)[1:], strict=False))
    assert ends[-1] == layout.bytes


def test_the_router_is_float32_under_every_recipe(source: Path) -> None:
    architecture = describe(open_folder(source))
    for precision in ("int4", "int8", "fp16", "fp32"):
        layout = plan_storage(architecture, make_recipe(precision, 32))
        router = layout.matrices["layers.0.router.weight"]
        assert router.format is None and router.codes.dtype == "float32"


@pytest.mark.parametrize(
    ("hidden", "inner", "asked", "given"),
    [(4096, 6400, 128, 128), (4096, 448, 128, 64), (4096, 960, 32, 32), (64, 48, 128, 16)],
)
def test_experts_get_the_largest_block_that_divides_their_channels(
    hidden: int, inner: int, asked: int, given: int, source: Path
) -> None:
    spec = replace(describe(open_folder(source)).spec, hidden_size=hidden, intermediate_size=inner)
    fmt = expert_format(make_recipe("int4", asked), spec)
    assert fmt is not None and fmt.block_size == given
    with pytest.raises(UsageError, match="40 channels"):
        expert_format(make_recipe("int4", asked), replace(spec, intermediate_size=40))


def test_the_published_configuration_is_read() -> None:
    """41.9 billion parameters, of which a token meets 6.6 (the model card); the switch of its rope; no window."""
    published = PUBLISHED["microsoft/Phi-3.5-MoE-instruct"]
    sizes = {name: prod(shape) for name, shape in expected_tensors(published).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert sum(sizes.values()) / 1e9 == pytest.approx(41.9, abs=0.05)
    assert (sum(sizes.values()) - experts * 14 / 16) / 1e9 == pytest.approx(6.6, abs=0.05)
    spec = phimoe.read_config(Config(published, "config.json"))
    assert spec.long_rope is not None and spec.long_rope.switch == 4096
    assert spec.sliding_window is None and spec.rope.dim == spec.head_dim == 128


# --- what is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts_per_tok", 1),
        ("hidden_act", "gelu"),
        ("router_jitter_noise", 1.5),
        ("num_local_experts", 0),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_what_is_not_built_is_refused_by_name(key: str, value: object, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        describe(open_folder(edited(source, tmp_path / "checkpoint", **{key: value})))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("lm_head_bias", False, "lm_head.bias"), ("attention_bias", False, "_proj.bias"), ("num_local_experts", 3, "")],
)
def test_tensors_that_the_configuration_denies_are_refused(
    key: str, value: object, named: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises((UnsupportedModelError, WeightError)) as caught:
        describe(open_folder(edited(source, tmp_path / "checkpoint", **{key: value})))
    assert (named or "gate.weight") in str(caught.value)


def test_a_missing_expert_and_a_damaged_one_are_named(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    folder = edited(source, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][5, 7] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"experts\.2\.w3"):
        build_graph(folder, tmp_path / "a", "int4", 16)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"experts\.2\.w3"):
        describe(open_folder(folder))


# --- onnxruntime-genai

# transformers 5.23.0, PhimoeForCausalLM in float32: the greedy continuation of the fixture's first 8 ids, a whole
# forward for each token; the winner leads by 0.017 standard deviations of the logits or more
GREEDY = (104, 33, 30, 77, 77, 77, 155, 149, 14, 132, 93, 37)


def test_stock_onnxruntime_genai_gives_the_reference_greedy_tokens(
    source: Path, reference: Reference, tmp_path: Path
) -> None:
    build_graph(source, tmp_path, "fp32")
    tokenizer = TokenizerFiles("{}", {}, None, None, (159,), 159, 160)
    write_genai_config(describe(open_folder(source)).spec, tokenizer, tmp_path)
    assert tuple(genai_tokens(tmp_path, reference[0][0, :8], 20)) == GREEDY
