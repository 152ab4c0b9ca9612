"""Graphs for other devices: the same weights, other operators, the same logits as far as float16 goes.

They run on the CPU provider here, which computes their operators too; what a device does with them is in
tests/end_to_end/test_webgpu.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgephi.errors import UsageError
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.variants import plan_variants
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.recipe import Recipe, make_recipe
from edgephi.runtime.placement.graph_facts import read_graph
from tests.decoding import Decoder, build_variants, distance
from tests.parity.test_gguf import write_gguf

# blocks of 16, because DirectML wants whole ones and a tiny checkpoint has 48 channels
EXACT = make_recipe("int4", 16, accuracy_level=1)
FAST = make_recipe("int4", 16, accuracy_level=4)
# of a logit's spread: float16 has 11 bits, and a handful of layers adds their rounding up
FLOAT16 = 0.05
CASES = ["phi3-mha", "phi3-gqa-partial", "phi3-longrope-long", "phi-parallel", "phi-qk", "llama-bias", "llama-tied"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["webgpu", "directml"])
def test_a_variant_computes_what_the_cpu_graph_does(case: str, device: str, fixtures: Path, tmp_path: Path) -> None:
    graphs = build_variants(fixtures / case, tmp_path, EXACT, [device])
    tokens = np.load(fixtures / case / "reference.npz")["input_ids"]
    always_long = {"rope_switch": np.array([0])} if "longrope" in case else {}
    reference = Decoder(graphs["cpu"], always_long).feed(tokens)
    bound = FLOAT16 if device == "directml" else 1e-5
    assert distance(Decoder(graphs[device], always_long).feed(tokens), reference) < bound
    assert distance(Decoder(graphs[device], always_long).feed_one_by_one(tokens), reference) < bound


def test_webgpu_computes_in_float16_unless_the_bundle_is_for_comparisons(fixtures: Path, tmp_path: Path) -> None:
    for recipe, kind in ((EXACT, onnx.TensorProto.FLOAT), (FAST, onnx.TensorProto.FLOAT16)):
        graph = load(build_variants(fixtures / "phi3-mha", tmp_path / str(kind), recipe, ["webgpu"])["webgpu"])
        assert graph.output[0].type.tensor_type.elem_type == kind


def test_webgpu_chooses_a_rope_without_row_numbers_which_it_would_not_read(fixtures: Path, tmp_path: Path) -> None:
    """GroupQueryAttention's tenth input. The CPU provider reads it, so that it alone could not tell."""
    graphs = build_variants(fixtures / "phi3-longrope-long", tmp_path, EXACT, ["webgpu"])
    for device, told in (("cpu", True), ("webgpu", False)):
        attentions = [node for node in load(graphs[device]).node if node.op_type == "GroupQueryAttention"]
        assert attentions
        assert {len(node.input) > 9 and node.input[9] != "" for node in attentions} == {told}
        assert read_graph(graphs[device]).row_numbers is told
    ids = np.load(fixtures / "phi3-longrope-long" / "reference.npz")["input_ids"]
    for length in (20, 32, 33, 48):  # the switch is at 32
        reference = Decoder(graphs["cpu"]).feed(ids[:, :length])
        assert distance(Decoder(graphs["webgpu"]).feed(ids[:, :length]), reference) < 1e-5
    decoder = Decoder(graphs["webgpu"])
    decoder.feed(ids[:, :32])
    with pytest.raises(Exception, match="the_sequence_became_long_compute_it_again"):
        decoder.feed(ids[:, 32:33])


def test_directml_gets_the_operators_it_has(fixtures: Path, tmp_path: Path) -> None:
    """Nothing packed, nothing rotated inside the attention, float16 at every port, positions as an input."""
    graph = load(build_variants(fixtures / "phi3-gqa-partial", tmp_path, FAST, ["directml"])["directml"])
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert attentions
    for node in attentions:
        assert all(node.input) and len(node.input) == 7
        assert {attribute.name for attribute in node.attribute} == {"num_heads", "kv_num_heads", "scale"}
        makers = [next(other for other in graph.node if name in other.output).op_type for name in node.input[:3]]
        assert makers == ["RotaryEmbedding", "RotaryEmbedding", "MatMulNBits"]
    floats = {port.type.tensor_type.elem_type for port in [*graph.input, *graph.output]} - {onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.FLOAT16}
    assert "position_ids" in {port.name for port in graph.input}


@pytest.mark.parametrize("case", ["phi3-gqa-partial", "llama-bias"])
def test_separate_projections_are_rows_of_the_packed_bytes(case: str, fixtures: Path, tmp_path: Path) -> None:
    """Laid end to end, what the graph calls q, k and v is what it calls qkv elsewhere; zero points too."""
    graphs = build_variants(fixtures / case, tmp_path, FAST, ["directml"])
    packed, separate = places(load(graphs["cpu"])), places(load(graphs["directml"]))
    for name, (offset, length) in packed.items():
        if "qkv_proj" not in name:
            continue
        parts = [separate[name.replace("qkv_proj", f"{part}_proj")] for part in "qkv"]
        assert parts[0][0] == offset
        assert [start for start, _ in parts[1:]] == [start + size for start, size in parts[:-1]]
        assert sum(size for _, size in parts) == length


def test_two_variants_cost_less_than_a_seventh_more_than_one(fixtures: Path, tmp_path: Path) -> None:
    """Graphs of tiny models are larger than their weights; what counts is that a variant brings no bytes of weights."""
    one = build_variants(fixtures / "phi3-mha", tmp_path / "one", FAST, [])
    all_three = build_variants(fixtures / "phi3-mha", tmp_path / "three", FAST, ["webgpu", "directml"])
    data = [(folder / DATA_FILE).read_bytes() for folder in (tmp_path / "one", tmp_path / "three")]
    assert data[0] == data[1]
    assert one["cpu"].read_bytes() == all_three["cpu"].read_bytes()
    assert all(path.stat().st_size < 100_000 for path in all_three.values())


def refusal(case: Path, device: str, recipe: Recipe = FAST) -> str:
    architecture = describe(open_folder(case))
    with pytest.raises(UsageError) as caught:
        plan_variants([device], architecture.spec, plan_storage(architecture, recipe), recipe)
    return str(caught.value)


def test_what_a_provider_would_compute_wrongly_is_refused(fixtures: Path) -> None:
    assert "sliding window" in refusal(fixtures / "phi3-window", "directml")
    assert "experts" in refusal(fixtures / "phimoe", "webgpu")
    assert "--precision" in refusal(fixtures / "phi3-mha", "webgpu", make_recipe("fp32", 32))
    assert "smaller --block-size" in refusal(fixtures / "phi3-mha", "directml", make_recipe("int4", 256))
    assert "cpu, webgpu and directml" in refusal(fixtures / "phi3-mha", "cuda")


def test_blocks_carried_over_are_the_same_for_gpus(fixtures: Path, tmp_path: Path) -> None:
    stored = open_gguf(write_gguf(fixtures / "llama-gqa", tmp_path / "a.gguf", "Q4_1"))
    recipe = make_recipe("int4", 32, accuracy_level=1, quantize="auto")
    graphs = build_variants(stored, tmp_path / "graphs", recipe, ["webgpu", "directml"])
    tokens = np.load(fixtures / "llama-gqa" / "reference.npz")["input_ids"]
    assert distance(Decoder(graphs["webgpu"]).feed(tokens), Decoder(graphs["cpu"]).feed(tokens)) < 1e-5
    # DirectML takes whole blocks only, also where the means of two blocks follow the inputs
    columns = [
        attribute.i for node in load(graphs["directml"]).node for attribute in node.attribute if attribute.name == "K"
    ]
    assert 64 + 2 + 30 in columns and not any(count % 32 for count in columns)


def load(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def places(graph: onnx.GraphProto) -> dict[str, tuple[int, int]]:
    """Offset and length in the data file, by initializer."""
    found = {}
    for tensor in graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        if facts:
            found[tensor.name] = (int(facts["offset"]), int(facts["length"]))
    return found
