"""The graph of a 4-bit GGUF file, repacked, computes what the decoded file does in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.decide import decide
from edgephi.export.families import describe
from edgephi.export.spec import Checkpoint
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.recipe import make_recipe
from tests.decoding import Decoder, build_graph, build_graph_with, build_variants, distance
from tests.parity.test_gguf import write_gguf
from tests.parity.test_phi import write_gguf as write_phi2

# embedding and head stay in float32: what differs is the linear layers
RECIPE = replace(make_recipe("int4", 32, accuracy_level=1, quantize="auto"), embedding=None)
# of a logit's spread; rounding these weights to 4 bits again costs 0.6 to 2.2
TOLERANCES = {"Q4_0": 1e-4, "Q4_1": 0.12}


def pair(case: Path, folder: Path, quantization: str) -> tuple[Checkpoint, Checkpoint]:
    """A fixture as a GGUF file in that type, and what the file means in float32."""
    found = []
    for name, dequantized in (("a.gguf", False), ("b.gguf", True)):
        if case.name.startswith("phi-"):
            file = write_phi2(case, folder / name, fused=False, quantization=quantization, dequantized=dequantized)
        else:
            file = write_gguf(case, folder / name, quantization, dequantized)
        found.append(open_gguf(file))
    return found[0], found[1]


@pytest.mark.parametrize("case", ["llama-gqa", "llama-linear-rope", "phi3-window", "phi3-gqa-partial", "phi-parallel"])
@pytest.mark.parametrize("quantization", TOLERANCES)
def test_logits_are_those_of_the_decoded_file(case: str, quantization: str, fixtures: Path, tmp_path: Path) -> None:
    stored, meant = pair(fixtures / case, tmp_path, quantization)
    layout = plan_storage(describe(stored), RECIPE)
    carried = [name for name, matrix in layout.matrices.items() if matrix.repacked == (quantization,)]
    assert len(carried) == 4 * describe(stored).spec.layers
    tokens = np.load(fixtures / case / "reference.npz")["input_ids"]
    reference = Decoder(build_graph(meant, tmp_path / "fp32", "fp32")).feed(tokens)
    graph = build_graph_with(stored, tmp_path / "carried", RECIPE)
    assert distance(Decoder(graph).feed(tokens), reference) < TOLERANCES[quantization]
    one_by_one = Decoder(graph).feed_one_by_one(tokens)
    assert distance(one_by_one, reference) < TOLERANCES[quantization]


def test_one_weight_of_several_types_is_carried_over_together(fixtures: Path, tmp_path: Path) -> None:
    """q and k in Q4_1, v in Q4_0: rows without offsets among rows with them."""
    case, mixed = fixtures / "llama-gqa", {"attn_v": "Q4_0"}
    stored = open_gguf(write_gguf(case, tmp_path / "a.gguf", "Q4_1", other_types=mixed))
    meant = open_gguf(write_gguf(case, tmp_path / "b.gguf", "Q4_1", dequantized=True, other_types=mixed))
    assert plan_storage(describe(stored), RECIPE).matrices["layers.0.qkv.weight"].repacked == ("Q4_0", "Q4_1")
    tokens = np.load(case / "reference.npz")["input_ids"]
    reference = Decoder(build_graph(meant, tmp_path / "fp32", "fp32")).feed(tokens)
    logits = Decoder(build_graph_with(stored, tmp_path / "carried", RECIPE)).feed(tokens)
    assert distance(logits, reference) < TOLERANCES["Q4_1"]


def test_a_weight_with_a_part_in_more_bits_gets_8(fixtures: Path, tmp_path: Path) -> None:
    case, mixed = fixtures / "llama-gqa", {"attn_v": "Q8_0"}
    stored = open_gguf(write_gguf(case, tmp_path / "a.gguf", "Q4_1", other_types=mixed))
    meant = open_gguf(write_gguf(case, tmp_path / "b.gguf", "Q4_1", dequantized=True, other_types=mixed))
    matrices = plan_storage(describe(stored), RECIPE).matrices
    qkv = matrices["layers.0.qkv.weight"]
    assert qkv.repacked == () and qkv.format is not None and qkv.format.bits == 8
    assert matrices["layers.0.o.weight"].repacked == ("Q4_1",)
    tokens = np.load(case / "reference.npz")["input_ids"]
    reference = Decoder(build_graph(meant, tmp_path / "fp32", "fp32")).feed(tokens)
    logits = Decoder(build_graph_with(stored, tmp_path / "carried", RECIPE)).feed(tokens)
    assert distance(logits, reference) < 0.2  # by offsets and 8 bits; 1 and more by 4


@pytest.mark.parametrize("types", [{"attn_v": "F16"}, {"attn_v": "Q8_0", "attn_q": "F32"}])
def test_a_weight_with_a_part_in_float_is_rounded(types: dict[str, str], fixtures: Path, tmp_path: Path) -> None:
    stored = open_gguf(write_gguf(fixtures / "llama-gqa", tmp_path / "a.gguf", "Q4_1", other_types=types))
    qkv = plan_storage(describe(stored), RECIPE).matrices["layers.0.qkv.weight"]
    assert qkv.repacked == () and qkv.format is not None and qkv.format.bits == 4


def test_where_nothing_is_in_4_bits_nothing_gets_8(fixtures: Path, tmp_path: Path) -> None:
    """That 8-bit file becomes the int4 bundle that was asked for."""
    stored = open_gguf(write_gguf(fixtures / "llama-gqa", tmp_path / "a.gguf", "Q8_0"))
    matrices = plan_storage(describe(stored), RECIPE).matrices
    assert {matrices[f"layers.0.{name}.weight"].format for name in ("qkv", "o", "gate_up", "down")} == {RECIPE.linear}


@pytest.mark.parametrize("recipe", [make_recipe("int4", 64, quantize="auto"), make_recipe("int8", 32, quantize="auto")])
def test_other_blocks_and_other_precisions_carry_nothing_over(recipe, fixtures: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stored = open_gguf(write_gguf(fixtures / "llama-gqa", tmp_path / "a.gguf", "Q4_1"))
    assert not any(matrix.repacked for matrix in plan_storage(describe(stored), recipe).matrices.values())


def test_means_are_computed_once_for_all_who_read_a_value(smollm2_bundle: Path) -> None:
    import onnx

    model = onnx.load(smollm2_bundle / "model.onnx", load_external_data=False)
    cut = [node.input[0] for node in model.graph.node if node.name.endswith("/block_means/AveragePool")]
    assert len(cut) == len(set(cut)) == 4 * 30


@pytest.mark.parametrize(
    ("case", "device", "op"),
    [("phi3-mha", "cpu", "AveragePool"), ("phi3-mha", "webgpu", "ReduceMean"), ("phi-parallel", "cpu", "ReduceMean")],
)
def test_means_are_pooled_where_the_cpu_s_graph_has_no_newer_operator(
    case: str, device: str, op: str, fixtures: Path, tmp_path: Path
) -> None:
    """AveragePool is fast on the CPU up to opset 18; Gelu, of Phi-2, came with 20."""
    import onnx

    stored, _ = pair(fixtures / case, tmp_path, "Q4_1")
    graph = build_variants(stored, tmp_path / "graphs", make_recipe("int4", 32, quantize="auto"), [device])[device]
    model = onnx.load(graph, load_external_data=False)
    assert {node.op_type for node in model.graph.node} & {"AveragePool", "ReduceMean"} == {op}
    newest = next(entry.version for entry in model.opset_import if not entry.domain)
    assert (newest <= 18) == (op == "AveragePool")


def test_auto_fits_where_blocks_cannot_stay_what_they_are(fixtures: Path, tmp_path: Path) -> None:
    """An NPU's w4a16 has scales of two levels, which no file holds."""
    stored = describe(open_gguf(write_gguf(fixtures / "llama-gqa", tmp_path / "a.gguf", "Q4_1")))
    picked = [decide(RECIPE, stored, "balanced", None, npu=npu)[0].quantize for npu in (None, "float16", "w4a16")]
    assert picked == ["auto", "auto", "gptq"]


def test_the_manifest_counts_what_is_repacked_and_what_gets_8_bits(fixtures: Path, tmp_path: Path) -> None:
    from edgephi.export.manifest import quantization_choice

    def said(types: dict[str, str]) -> tuple[str, str]:
        file = tmp_path / f"{len(types)}.gguf"
        stored = describe(open_gguf(write_gguf(fixtures / "llama-gqa", file, "Q4_1", other_types=types)))
        choice = quantization_choice(plan_storage(stored, RECIPE), decide(RECIPE, stored, "balanced", None)[0])
        assert choice is not None
        return choice.picked, choice.reason

    assert said({}) == ("carried over", "the source holds every linear weight in 4-bit blocks of 32")
    assert said({"attn_v": "Q8_0", "attn_output": "F16"}) == (
        "carried over, the rest rounded to nearest",
        "the source holds 4 of 8 linear weights in 4-bit blocks of 32, and 2 in more bits, which get 8",
    )
