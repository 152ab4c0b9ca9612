"""QDQ graphs of the layers: ranges are those of the text, formats those the NPU multiplies in integers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgephi
from edgephi.errors import UnsupportedModelError, UsageError
from edgephi.export.calibrate.layer import LayerGraph, layer_bytes, layer_weights, start_of
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.npu.decoder import npu_decoder, stages
from edgephi.export.npu.encodings import HEAD_ROOM, Encodings, encoding, find_or_measure, measure_encodings
from edgephi.export.npu.qdq_graph import qdq_stage_graph
from edgephi.export.npu.qdq_storage import plan_qdq_storage
from edgephi.export.spec import Architecture
from edgephi.export.weights.embedding import embed
from edgephi.export.weights.recipe import make_recipe
from edgephi.export.weights.transforms import read_weight
from tests.decoding import Decoder, build_graph
from tests.npu_reference import X_ELITE
from tests.tiny_phi import PHI_3, PHI_4_MINI, TOKENS, tiny_phi

RECIPE = replace(make_recipe("int4", 32), float_type="float16")


@pytest.fixture(scope="module", params=[PHI_3, PHI_4_MINI], ids=["phi-3", "phi-4-mini"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("qdq") / "source", request.param, 320)


@pytest.fixture(scope="module")
def architecture(source: Path) -> Architecture:
    return describe(open_folder(source))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(3, TOKENS, (3, 40))


@pytest.fixture(scope="module")
def encodings(architecture: Architecture, tokens: np.ndarray) -> Encodings:
    return measure_encodings(architecture, tokens)


def test_ranges_are_measured_once(architecture: Architecture, tokens: np.ndarray, tmp_path: Path) -> None:
    told: list[int] = []
    file = tmp_path / "encodings.json"
    found = find_or_measure(architecture, tokens, file, told.append)
    assert len(told) == architecture.spec.layers
    assert sum(told) == layer_bytes(architecture, range(architecture.spec.layers)) > 0
    told_again: list[int] = []
    # another text shows that nothing is computed
    assert find_or_measure(architecture, tokens[:, ::-1], file, told_again.append) == found
    assert told_again == [sum(told)]
    file.write_bytes(file.read_bytes()[:-20])
    assert find_or_measure(architecture, tokens, file, told.append) == found
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_ranges_are_those_of_what_linear_layers_multiply_and_give(
    architecture: Architecture, tokens: np.ndarray, encodings: Encodings
) -> None:
    """The inputs are recorded one by one, the outputs multiplied by NumPy."""
    hidden = embed(architecture, tokens)
    for layer in range(architecture.spec.layers):
        graph = LayerGraph(architecture, layer, tokens.shape[1])
        weights = {name: read_weight(weight) for name, weight in layer_weights(architecture, layer).items()}
        for name in (f"layers.{layer}.{module}.weight" for module in ("qkv", "o", "gate_up", "down")):
            taken = np.concatenate(list(graph.inputs(name, start_of(hidden), weights)))
            for values, found in (
                (taken, encodings.linear[name].input),
                (taken @ weights[name].T, encodings.linear[name].output),
            ):
                low, high = (HEAD_ROOM * float(end) for end in (min(values.min(), 0), max(values.max(), 0)))
                assert found.scale == pytest.approx((high - low) / 65535, rel=1e-3)
                assert -found.zero_point * found.scale == pytest.approx(low, abs=1e-3 * (high - low))
        hidden = graph.run(hidden, weights)


def test_ranges_of_the_cache_are_those_of_the_float_models(
    source: Path, tokens: np.ndarray, encodings: Encodings, tmp_path: Path
) -> None:
    """Keys are cached rotated; the whole exported decoder has them too."""
    graph, caches = build_graph(source, tmp_path / "fp32", "fp32"), []
    for sequence in tokens:
        decoder = Decoder(graph)
        decoder.feed(sequence[None])
        caches.append(decoder.past)
    for layer, found in enumerate(encodings.cache):
        for part, held in (("key", found.key), ("value", found.value)):
            values = np.stack([cache[f"past_key_values.{layer}.{part}"] for cache in caches])
            assert held.scale == pytest.approx((values.max() - values.min()) / 255, rel=2e-3)
            assert held.scale == np.float16(held.scale)
            codes = np.clip(np.rint(values / held.scale) + held.zero_point, 0, 255)
            assert np.abs((codes - held.zero_point) * held.scale - values).max() < 0.8 * held.scale


def test_the_cache_is_eight_bits_between_two_runs_and_float16_for_attention(
    architecture: Architecture, encodings: Encodings
) -> None:
    decoder = npu_decoder(architecture, X_ELITE)
    layout = plan_qdq_storage(decoder.inner, RECIPE)
    stage = stages(decoder.inner.spec, X_ELITE, decoder.cache_rows)[0]
    graph = qdq_stage_graph(decoder.inner.spec, layout, RECIPE, encodings, stage).graph
    cached = [*graph.inputs[3:], *graph.outputs[1:]]
    assert len(cached) == 4 * architecture.spec.layers
    assert {value.dtype for value in cached} == {ir.DataType.UINT8}
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            producers = [value.producer() for value in node.inputs[3:5] if value is not None]
            assert [one.op_type for one in producers if one is not None] == 2 * ["DequantizeLinear"]
            consumers = [consumer.op_type for value in node.outputs[1:] for consumer, _ in value.uses()]
            assert consumers == 2 * ["QuantizeLinear"]


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.5, 2.0), (-7.0, -1.0), (0.0, 0.0), (-1e-9, 0.0)])
def test_zero_has_a_code_and_the_range_fits(low: float, high: float) -> None:
    found = encoding(low, high)
    assert 0 <= found.zero_point <= 65535 and found.scale > 0
    assert -found.zero_point * found.scale <= low + found.scale
    assert (65535 - found.zero_point) * found.scale >= high - found.scale


def test_both_phases_have_the_same_weights_and_the_same_encodings(
    architecture: Architecture, encodings: Encodings
) -> None:
    decoder = npu_decoder(architecture, X_ELITE)
    layout = plan_qdq_storage(decoder.inner, RECIPE)
    graphs = [
        qdq_stage_graph(decoder.inner.spec, layout, RECIPE, encodings, stage).graph
        for stage in stages(decoder.inner.spec, X_ELITE, decoder.cache_rows)
    ]
    values = [{name: describe_constant(value) for name, value in graph.initializers.items()} for graph in graphs]
    assert values[0] == values[1]


def describe_constant(value: ir.Value) -> object:
    data = value.const_value
    assert data is not None
    return (data.offset, data.length) if isinstance(data, ir.ExternalTensor) else data.tobytes()


def test_every_linear_layer_is_int4_or_int8_times_sixteen_bits(
    architecture: Architecture, encodings: Encodings
) -> None:
    decoder = npu_decoder(architecture, X_ELITE)
    layout = plan_qdq_storage(decoder.inner, RECIPE)
    stage = stages(decoder.inner.spec, X_ELITE, decoder.cache_rows)[0]
    graph = qdq_stage_graph(decoder.inner.spec, layout, RECIPE, encodings, stage).graph
    products = [node for node in graph if node.op_type == "MatMul"]
    assert len(products) == 4 * architecture.spec.layers
    for node in products:
        taken, weight = (value.producer() for value in node.inputs if value is not None)
        assert taken is not None and weight is not None
        assert {taken.op_type, weight.op_type} == {"DequantizeLinear"}
        assert taken.inputs[2].dtype == ir.DataType.UINT16
        bits = ir.DataType.INT8 if any(name in str(node.name) for name in ("qkv", "down")) else ir.DataType.INT4
        assert weight.inputs[0].dtype == bits
        (consumer,) = node.outputs[0].consumers()
        assert consumer.op_type == "QuantizeLinear"
    assert not [node for node in graph if node.op_type == "MatMulNBits"]


def test_rows_that_are_no_whole_blocks_are_a_sentence(architecture: Architecture) -> None:
    recipe = replace(make_recipe("int4", 256), float_type="float16")
    with pytest.raises(UnsupportedModelError, match="128 columns, with blocks of 256"):
        plan_qdq_storage(npu_decoder(architecture, X_ELITE).inner, recipe)


def test_w4a16_without_an_npu_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="w4a16 is for an NPU"):
        edgephi.export(tmp_path, tmp_path / "out", npu_numerics="w4a16")
