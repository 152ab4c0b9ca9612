"""A decoder layer is written once: one function and one builder of attention serve the graphs of every target."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgephi.export.calibrate.layer import RecordingBuilder
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from edgephi.export.graph import layer as layer_module
from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.graph.decoder import build_graph
from edgephi.export.graph.layer_graph import emit_layer, layer_graph, single_layer
from edgephi.export.graph.mlp import mlp
from edgephi.export.npu.decoder import npu_decoder
from edgephi.export.npu.encodings import Encodings, measure_encodings
from edgephi.export.npu.layers import plan_layers
from edgephi.export.npu.qdq_graph import qdq_stage_graph
from edgephi.export.npu.static_graph import Stage, stage_graph
from edgephi.export.npu.token_graph import token_graph
from edgephi.export.spec import Architecture, DecoderSpec
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.recipe import make_recipe
from tests.npu_reference import X_ELITE
from tests.tiny_phi import PHI_3, TOKENS, tiny_phi

EXPORT = Path(__file__).resolve().parents[2] / "export"
SHAPE, LAYERS = PHI_3 | {"sliding_window": 256}, 2
LAYER = ("Norm", "linear", "GroupQueryAttention", "linear", "Add")
LAYER += ("Norm", "linear", "Split", "Sigmoid", "Mul", "Mul", "linear", "Add")
NAMES = ("cpu", "directml", "float model", "calibration", "npu float16", "npu stages", "npu w4a16", "npu token")
LINEAR = {"MatMulNBits", "FusedMatMul", "MatMul"}
CONVERSIONS = {"Cast", "QuantizeLinear", "DequantizeLinear"}
"""Of a value between the types of linear layers, of attention and of the KV cache; they compute nothing."""


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return describe(open_folder(tiny_phi(tmp_path_factory.mktemp("layer") / "source", SHAPE, 320)))


@pytest.fixture(scope="module")
def encodings(architecture: Architecture) -> Encodings:
    return measure_encodings(architecture, np.random.default_rng(2).integers(3, TOKENS, (2, 16)))


@pytest.fixture
def graphs(architecture: Architecture, encodings: Encodings) -> Mapping[str, Callable[[], list[ir.Node]]]:
    """What builds each kind of graph that has layers, all of the same decoder."""
    recipe, single = make_recipe("int4", 32), make_recipe("fp32", 32)
    half = replace(recipe, float_type="float16", accuracy_level=1)
    layout = plan_storage(architecture, recipe)
    decoder = npu_decoder(architecture, X_ELITE)
    spec, rows = decoder.inner.spec, decoder.cache_rows
    blocks, codes = (plan_layers(decoder, recipe, numerics) for numerics in ("float16", "w4a16"))

    def whole(**form: bool) -> list[ir.Node]:
        return list(build_graph(architecture.spec, layout, recipe, **form).graph)  # type: ignore[arg-type]

    def layer_by_layer(nodes_of: Callable[[Architecture], Iterable[ir.Node]]) -> list[ir.Node]:
        return [node for number in range(LAYERS) for node in nodes_of(single_layer(architecture, number, 16))]

    def of_the_float_model(part: Architecture) -> Iterable[ir.Node]:
        return layer_graph(part.spec, plan_storage(part, single), single).graph

    def of_calibration(part: Architecture) -> Iterable[ir.Node]:
        emit = RecordingBuilder(plan_storage(part, single), single)
        emit_layer(emit, part.spec)
        return emit.nodes

    def stages(build: Callable[[Stage], ir.Model]) -> list[ir.Node]:
        return [node for layer in range(LAYERS) for node in build(Stage(layer, layer + 1, X_ELITE.chunk, rows)).graph]

    return {
        "cpu": whole,
        "directml": lambda: whole(separate=True),
        "float model": lambda: layer_by_layer(of_the_float_model),
        "calibration": lambda: layer_by_layer(of_calibration),
        "npu float16": lambda: list(stage_graph(spec, blocks, half, Stage(0, LAYERS, X_ELITE.chunk, rows)).graph),
        "npu stages": lambda: stages(lambda stage: stage_graph(spec, blocks, half, stage)),
        "npu w4a16": lambda: stages(lambda stage: qdq_stage_graph(spec, codes, half, encodings, stage)),
        "npu token": lambda: list(token_graph(spec, blocks, recipe, Stage(0, LAYERS, 1, rows)).graph),
    }


def operations(nodes: Iterable[ir.Node]) -> tuple[str, ...]:
    """What the layers compute, in order, however a target writes it."""
    found: list[str] = []
    for node in nodes:
        if not str(node.name).startswith("/model/layers."):
            continue
        match node.op_type:
            case "SkipSimplifiedLayerNormalization":
                found += ["Add", "Norm"]
            case "SimplifiedLayerNormalization":
                found.append("Norm")
            case operator if operator in LINEAR:
                found.append("linear")
            case operator if operator not in CONVERSIONS:
                found.append(operator)
    return tuple(found)


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_has_the_same_operations_in_a_layer(
    name: str, graphs: Mapping[str, Callable[[], list[ir.Node]]]
) -> None:
    expected = LAYER * LAYERS
    if name not in ("float model", "calibration"):
        expected = expected[:-1]  # the last addition belongs to the final norm
    found = operations(graphs[name]())
    if name == "directml":  # attention takes queries, keys and values apart and already rotated
        assert found.count("RotaryEmbedding") == 2 * LAYERS and found.count("linear") == 6 * LAYERS
        apart = ("linear", "linear", "linear", "RotaryEmbedding", "RotaryEmbedding")
        expected = tuple(
            operation
            for index, wanted in enumerate(expected)
            for operation in (apart if index % len(LAYER) == 1 else (wanted,))
        )
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_added_in_one_place_is_in_every_graph(
    name: str, graphs: Mapping[str, Callable[[], list[ir.Node]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_one_more(emit: GraphBuilder, spec: DecoderSpec, layer: int, normed: ir.Value) -> ir.Value:
        return emit.op("Neg", f"/model/layers.{layer}/toy/Neg", [mlp(emit, spec, layer, normed)])

    monkeypatch.setattr(layer_module, "mlp", with_one_more)
    added = [str(node.name) for node in graphs[name]() if node.op_type == "Neg"]
    assert len(added) == LAYERS


@pytest.mark.parametrize("name", NAMES)
def test_attention_has_the_attributes_its_target_takes(
    name: str, graphs: Mapping[str, Callable[[], list[ir.Node]]], architecture: Architecture
) -> None:
    spec = architecture.spec
    assert spec.sliding_window == 256
    expected: dict[str, object] = {"num_heads": 4, "kv_num_heads": 4, "scale": pytest.approx(spec.head_dim**-0.5)}
    if name != "directml":
        expected["do_rotary"] = 1
    if not name.startswith("npu"):
        expected["local_window_size"] = spec.sliding_window
        if name != "directml":
            expected["rotary_interleaved"] = 0
    found = [node for node in graphs[name]() if node.op_type == "GroupQueryAttention"]
    assert len(found) == LAYERS
    for node in found:
        assert {key: attribute.value for key, attribute in node.attributes.items()} == expected


def calls_in_export() -> list[tuple[Path, ast.Call]]:
    return [
        (file, node)
        for file in sorted(EXPORT.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


@pytest.mark.parametrize("operator", ["GroupQueryAttention", "SkipSimplifiedLayerNormalization", "MatMulNBits", "QMoE"])
def test_an_operator_is_emitted_in_one_place(operator: str) -> None:
    emitting = [
        str(file.relative_to(EXPORT))
        for file, call in calls_in_export()
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("op", "node") and call.args
        if isinstance(call.args[0], ast.Constant) and call.args[0].value == operator
    ]
    assert len(emitting) == 1, emitting


@pytest.mark.parametrize("function", ["decoder_layer", "attention", "mlp"])
def test_a_layer_is_put_together_in_one_place(function: str) -> None:
    calling = {
        file.relative_to(EXPORT).as_posix()
        for file, call in calls_in_export()
        if isinstance(call.func, ast.Name) and call.func.id == function
    }
    assert calling == {"graph/layer.py"}


def test_families_say_what_a_decoder_is_and_know_nothing_of_graphs() -> None:
    for file in (EXPORT / "families").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("edgephi.export.graph"), file
