"""A traced graph computes the same after its matrices became quantized ones; no torch is needed to see that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgephi.errors import UnsupportedModelError, UsageError
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.optimum.export import _require_loadable
from edgephi.export.optimum.rewrite import TracedWeights, rewrite, write_weights
from edgephi.export.optimum.traced_decoder import Ports, read_ports
from edgephi.export.weights.recipe import make_recipe
from edgephi.installed import install_extra

WIDTH, VOCABULARY = 32, 48
Floats = NDArray[np.float32]


def on_a_grid(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    """[rows, columns] of multiples of 1/8 that 4 bits in blocks of 32 hold exactly, along columns and along rows.

    Every block has the extreme code -8.
    """
    codes = rng.integers(-8, 8, (rows, columns))
    codes[:, ::32] = -8
    codes[::32, :] = -8
    return codes.astype(np.float32) / 8


def traced_graph(folder: Path, *, tied: bool = False) -> tuple[Path, dict[str, Floats]]:
    """Lookup → four linear layers in all the ways tracers write them → logits; weights are beside the graph.

    `wide` is as wide as the vocabulary and is not the head.
    """
    rng = np.random.default_rng(7)
    weights = {
        "embed": np.clip(rng.normal(size=(VOCABULARY, WIDTH)), -1, 1).astype(np.float32),
        "wide": on_a_grid(rng, VOCABULARY, WIDTH),
        "narrow": on_a_grid(rng, VOCABULARY, WIDTH),
        "square": on_a_grid(rng, WIDTH, WIDTH),
        "gemm": on_a_grid(rng, WIDTH, WIDTH),
        "gemm_bias": (300 * rng.normal(size=WIDTH)).astype(np.float32),  # as large as what it is added to
        "head": np.clip(rng.normal(size=(VOCABULARY, WIDTH)), -1, 1).astype(np.float32),
        "gain": rng.normal(size=WIDTH).astype(np.float32),
    }
    if tied:
        del weights["head"]
    head = "embed" if tied else "head"
    nodes = [
        helper.make_node("Reshape", ["input_ids", "flat"], ["ids"]),
        helper.make_node("Gather", ["embed", "ids"], ["x0"], axis=0),
        helper.make_node("Transpose", ["wide"], ["wide_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x0", "wide_t"], ["x1"], name="wide_linear"),
        helper.make_node("MatMul", ["x1", "narrow"], ["x2"], name="narrow_linear"),
        helper.make_node("Identity", ["square"], ["square_i"]),
        helper.make_node("MatMul", ["x2", "square_i"], ["x3"], name="square_linear"),
        helper.make_node("Reshape", ["x3", "rows"], ["x4"]),
        helper.make_node("Gemm", ["x4", "gemm", "gemm_bias"], ["x5"], name="gemm_linear", transB=1),
        helper.make_node("Mul", ["x5", "gain"], ["x6"]),
        helper.make_node("Transpose", [head], ["head_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x6", "head_t"], ["x7"], name="head_linear"),
        helper.make_node("Reshape", ["x7", "batched"], ["logits"]),
    ]
    shapes = {"flat": [1, -1], "rows": [-1, WIDTH], "batched": [1, -1, VOCABULARY]}
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    constants += [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in shapes.items()]
    graph = helper.make_graph(
        nodes,
        "traced",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "sequence", VOCABULARY])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, folder / "traced.onnx", save_as_external_data=True, location="traced.data", size_threshold=100)
    return folder / "traced.onnx", weights


def rewritten(traced: Path, folder: Path, precision: str) -> TracedWeights:
    import onnx_ir as ir

    model = ir.load(traced)
    weights = rewrite(model, make_recipe(precision, 32, accuracy_level=1))  # type: ignore[arg-type]
    ir.save(model, folder / "model.onnx")
    write_weights(weights, folder / DATA_FILE, 2, lambda count: None)
    return weights


def run(graph: Path) -> Floats:
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input_ids": np.arange(VOCABULARY)[None]})[0])


def operators(graph: Path) -> dict[str, int]:
    types = [node.op_type for node in onnx.load(graph, load_external_data=False).graph.node]
    return {op: types.count(op) for op in set(types)}


@pytest.mark.parametrize("tied", [False, True])
def test_fp32_keeps_every_node_and_every_value(tied: bool, tmp_path: Path) -> None:
    traced, _ = traced_graph(tmp_path, tied=tied)
    expected = run(traced)
    weights = rewritten(traced, tmp_path, "fp32")
    assert weights.matrices == () and weights.tied_embedding == tied
    assert operators(tmp_path / "model.onnx") == operators(traced)
    np.testing.assert_array_equal(run(tmp_path / "model.onnx"), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_int4_computes_what_its_weights_say(tied: bool, tmp_path: Path) -> None:
    """Linear weights lie on the 4-bit grid, so all that is lost is what 8 bits lose of embedding and head."""
    traced, _ = traced_graph(tmp_path, tied=tied)
    expected = run(traced)
    rewritten(traced, tmp_path, "int4")
    assert np.abs(run(tmp_path / "model.onnx") - expected).max() < 0.03 * expected.std()


def test_every_linear_layer_and_the_lookup_become_quantized_operators(tmp_path: Path) -> None:
    traced, _ = traced_graph(tmp_path)
    weights = rewritten(traced, tmp_path, "int4")
    found = operators(tmp_path / "model.onnx")
    assert (found["MatMulNBits"], found["GatherBlockQuantized"]) == (5, 1)
    assert not {"MatMul", "Gemm", "Gather", "Transpose"} & found.keys()
    roles = {matrix.stored.codes.name.split("_")[0]: (matrix.role, matrix.turned) for matrix in weights.matrices}
    assert roles == {
        "embed": ("embedding", False),
        "wide": ("linear", False),
        "narrow.T": ("linear", True),
        "square.T": ("linear", True),
        "gemm": ("linear", False),
        "head": ("head", False),
    }


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    traced, _ = traced_graph(tmp_path, tied=True)
    weights = rewritten(traced, tmp_path, "int4")
    assert weights.tied_embedding
    assert [matrix.role for matrix in weights.matrices].count("embedding") == 1
    assert "head" not in [matrix.role for matrix in weights.matrices]
    stored = {
        init.name: {entry.key: entry.value for entry in init.external_data}
        for init in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    }
    assert stored["embed_Q8G32"] == stored["embed_Q8G32_rows"]


def test_the_bundle_does_not_refer_to_the_traced_graphs_data(tmp_path: Path) -> None:
    traced, _ = traced_graph(tmp_path)
    rewritten(traced, tmp_path, "int4")
    for file in tmp_path.glob("traced.*"):
        file.unlink()
    assert np.isfinite(run(tmp_path / "model.onnx")).all()


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    traced, _ = traced_graph(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rewritten(traced, tmp_path / name, "int4")
    for file in ("model.onnx", DATA_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# --- inputs and outputs


def ports_of(inputs: dict[str, list[str | int]], outputs: dict[str, list[str | int]]) -> Ports:
    import onnx_ir as ir

    def value(name: str, shape: list[str | int]) -> ir.Value:
        dtype = ir.DataType.INT64 if len(shape) == 2 else ir.DataType.FLOAT
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    graph = ir.Graph(
        [value(*item) for item in inputs.items()], [value(*item) for item in outputs.items()], nodes=[], name="ports"
    )
    return read_ports(graph, "config.json")


CACHE: list[str | int] = ["batch_size", 2, "past_sequence_length", 16]
INPUTS: dict[str, list[str | int]] = {
    "input_ids": ["batch_size", "sequence_length"],
    "attention_mask": ["batch_size", "total_sequence_length"],
    "past_key_values.0.key": CACHE,
    "past_key_values.0.value": CACHE,
}
OUTPUTS: dict[str, list[str | int]] = {
    "logits": ["batch_size", "sequence_length", 48],
    "present.0.key": CACHE,
    "present.0.value": CACHE,
}


def test_sizes_are_read_from_the_ports() -> None:
    assert ports_of(INPUTS, OUTPUTS) == Ports(1, 2, 16, 48, position_ids=False)
    assert ports_of(INPUTS | {"position_ids": ["batch_size", "sequence_length"]}, OUTPUTS).position_ids


@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        (INPUTS | {"token_type_ids": ["batch_size", "sequence_length"]}, OUTPUTS, "does not know token_type_ids"),
        ({name: INPUTS[name] for name in INPUTS if name != "attention_mask"}, OUTPUTS, "attention_mask is missing"),
        (INPUTS, {name: OUTPUTS[name] for name in OUTPUTS if name != "present.0.value"}, "present.0.value is missing"),
        (INPUTS, OUTPUTS | {"present.0.value": ["batch_size", 4, "length", 16]}, "present.0.value has another shape"),
        (INPUTS, OUTPUTS | {"logits": ["batch_size", "sequence_length", "vocabulary"]}, "logits is FLOAT"),
        (dict(list(INPUTS.items())[:2]), {"logits": OUTPUTS["logits"]}, "it has no KV cache"),
    ],
)
def test_other_ports_are_refused(
    inputs: dict[str, list[str | int]], outputs: dict[str, list[str | int]], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match="no decoder that onnxruntime-genai runs") as caught:
        ports_of(inputs, outputs)
    assert said in caught.value.what


# --- the extra


def test_without_the_extra_the_error_says_how_to_install_it(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    import edgephi

    def version(name: str) -> str:
        if name == "optimum-onnx":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UsageError, match="optimum-onnx, which is not installed") as caught:
        edgephi.export(fixtures / "llama-gqa", tmp_path / "bundle", via="optimum")
    assert install_extra("optimum") in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family_is_told_about_optimum(fixtures: Path, tmp_path: Path) -> None:
    import json
    import shutil

    import edgephi

    source = shutil.copytree(fixtures / "llama-gqa", tmp_path / "other")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    with pytest.raises(UnsupportedModelError, match="model_type is 'gpt_neox'") as caught:
        edgephi.export(source, tmp_path / "bundle")
    assert "--via optimum" in caught.value.remedy


def test_functions_of_a_traced_graph_are_written_out_because_bundles_have_none(tmp_path: Path) -> None:
    path, _ = traced_graph(tmp_path)
    model = onnx.load(path, load_external_data=False)
    sin = helper.make_node("Sin", ["a"], ["b"])
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("traced", "wave", ["a"], ["b"], [sin], opsets))
    model.opset_import.append(helper.make_opsetid("traced", 1))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("wave", ["before"], ["logits"], domain="traced"))
    path.write_bytes(model.SerializeToString())
    written = ir.load(path)
    rewrite(written, make_recipe("fp32", 32))
    ir.save(written, tmp_path / "model.onnx")
    _require_loadable(tmp_path / "model.onnx")
    found = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert not found.functions
    assert found.graph.node[-1].op_type == "Sin"


def test_a_traced_graph_with_a_loop_is_refused_before_it_becomes_a_bundle(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "body", [], [value])
    loop = helper.make_node("Loop", ["n", "c", "x"], ["y"], body=body)
    onnx.save(helper.make_model(helper.make_graph([loop], "g", [], [value])), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match="repeats"):
        _require_loadable(tmp_path / "model.onnx")
