"""The graph that computes prompts by integers: what is read from protobuf is written again, and its weights are the
bundle's.

References: the onnx package for the file, float matrices and float products by NumPy for the numbers.
"""

from __future__ import annotations

import io
from pathlib import Path

import ml_dtypes  # noqa: F401
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import edgephi
from edgephi.ort import open_session, session_options
from edgephi.runtime.integers.graph import candidates, write_integers
from edgephi.runtime.integers.model_file import GraphFile, read_model, write_model
from edgephi.runtime.integers.weights import block_linear, weight_slices
from tests.tiny_phi import PHI_4_MINI, tiny_phi

ROWS, COLUMNS = 48, 64


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integer-graph")
    edgephi.export(tiny_phi(folder / "checkpoint", PHI_4_MINI), folder / "bundle")
    return folder / "bundle"


def test_what_is_read_is_written_again(bundle: Path) -> None:
    stored = (bundle / "model_rows.onnx").read_bytes()
    before, after = onnx.load_from_string(stored), onnx.load_from_string(write_model(read_model(stored)))
    assert len(before.graph.node) > 20
    assert list(before.graph.node) == list(after.graph.node)
    assert list(before.graph.initializer) == list(after.graph.initializer)
    assert list(before.graph.input) == list(after.graph.input)
    assert list(before.graph.output) == list(after.graph.output)
    assert (before.ir_version, list(before.opset_import)) == (after.ir_version, list(after.opset_import))


def small_graph(
    weights: NDArray[np.float32], bits: int, zero_points: bool, bias: bool, means: bool = False
) -> tuple[bytes, NDArray[np.float32], NDArray[np.float32]]:
    """A MatMulNBits node over rounded weights, the whole matrix it multiplies by, and its bias."""
    rng = np.random.default_rng(1)
    columns, block = weights.shape[1], 32
    blocks = weights.reshape(ROWS, -1, block)
    scales = (np.abs(blocks).max(-1) / (2 ** (bits - 1) - 1)).astype(np.float16)
    codes = np.clip(np.rint(blocks / scales[..., None].astype(np.float32)) + 2 ** (bits - 1), 0, 2**bits - 1)
    zeros = rng.integers(3, 12, blocks.shape[:2]) if zero_points else np.full(blocks.shape[:2], 2 ** (bits - 1))
    matrix = ((codes - zeros[..., None]) * scales[..., None].astype(np.float32)).reshape(ROWS, columns)
    codes = codes.astype(np.uint8)

    def packed(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if bits == 8:
            return values
        even = np.concatenate([values, np.zeros((*values.shape[:-1], values.shape[-1] % 2), np.uint8)], axis=-1)
        return even[..., ::2] | even[..., 1::2] << 4

    addend = rng.standard_normal(ROWS).astype(np.float32)
    tensors = {"codes": packed(codes), "scales": scales}
    inputs = ["x", "codes", "wide", "", "", ""]
    if zero_points:
        tensors["zeros"], inputs[3] = packed(zeros.astype(np.uint8)), "zeros"
    if bias:
        tensors["bias"], inputs[5] = addend, "bias"
    while not inputs[-1]:
        inputs.pop()
    nodes = []
    if means:
        window = {"kernel_shape": [block], "strides": [block]}
        nodes += [
            helper.make_node("AveragePool", ["x"], ["means"], **window),
            helper.make_node("Concat", ["x", "means"], ["joined"], axis=-1),
        ]
        inputs[0] = "joined"
    nodes += [
        helper.make_node("Cast", ["scales"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node(
            "MatMulNBits", inputs, ["y"], "/model/layers.0/attn/qkv_proj/MatMulNBits", domain="com.microsoft",
            K=columns, N=ROWS, bits=bits, block_size=block, accuracy_level=1,
        ),
    ]  # fmt: skip
    ports = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "length"]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "length", COLUMNS]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "length", ROWS])
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "main_graph", ports, [output], initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString(), matrix, addend if bias else np.zeros(ROWS, np.float32)


def whole_matrix(model: GraphFile) -> NDArray[np.float32]:
    node = next(node for node in model.nodes if node.operator == "MatMulNBits")
    linear = block_linear(node, model.producer(), {})
    assert linear is not None
    return np.concatenate([values for _, values in weight_slices(model, linear, NOTHING, model.producer())])


NOTHING = np.empty(0, np.uint8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_blocks_are_read_as_the_kernel_reads_them(bits: int, zero_points: bool) -> None:
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS + 32)).astype(np.float32)[:, :COLUMNS]
    stored, matrix, _ = small_graph(weights, bits, zero_points, bias=False)
    np.testing.assert_allclose(whole_matrix(read_model(stored)), matrix, rtol=1e-6)
    x = np.eye(COLUMNS, dtype=np.float32)[None]
    ids = np.zeros((1, COLUMNS), np.int64)
    session = onnxruntime.InferenceSession(stored, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x, "input_ids": ids})[0][0].T, matrix, atol=1e-5)


def test_columns_for_means_of_blocks_are_counted_into_those_of_the_inputs() -> None:
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    stored, matrix, _ = small_graph(np.concatenate([weights, np.ones((ROWS, 32), np.float32)], 1), 4, False, False)
    model = read_model(stored)
    node = model.nodes[-1]
    # as an export writes it: the inputs, two means of 32 and 30 zeros
    from edgephi.runtime.placement.graph_parts import Node

    model.nodes[:0] = [
        Node("AveragePool", ["x"], ["means"]),
        Node("Expand", ["zero", "shape"], ["nothing"]),
        Node("Concat", ["x", "means", "nothing"], ["joined"]),
    ]
    node.inputs[0] = "joined"
    linear = block_linear(node, model.producer(), {"nothing": 30})
    assert linear is not None
    assert (linear.columns, linear.means) == (COLUMNS, (COLUMNS,))
    found = np.concatenate([values for _, values in weight_slices(model, linear, NOTHING, model.producer())])
    expected = matrix[:, :COLUMNS] + np.repeat(matrix[:, COLUMNS : COLUMNS + 2] / 32, 32, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_integer_products_are_close_to_the_blocks_own_and_rows_do_not_depend_on_each_other(
    bias: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    stored, matrix, addend = small_graph(weights, 4, True, bias)
    x = rng.standard_normal((1, 40, COLUMNS)).astype(np.float32)
    x[..., 7] *= 50  # the channel that leaves the others no steps
    model = read_model(stored)
    found = candidates(model, NOTHING)
    with (tmp_path / "data").open("wb") as stream:
        write_integers(model, found, {"x": np.abs(x).max((0, 1))}, NOTHING, "data", stream)
    assert not any(node.operator == "MatMulNBits" for node in model.nodes)
    session = open_session(write_model(model), session_options(data_folder=tmp_path), where="test", remedy="")

    def run(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        feeds = {"x": rows, "input_ids": np.zeros(rows.shape[:2], np.int64)}
        result: NDArray[np.float32] = session.run(["y"], feeds)[0]
        return result

    exact = x[0] @ matrix.T + addend
    got = run(x)
    assert np.abs(got[0] - exact).std() < 0.02 * exact.std()
    for part in (slice(0, 1), slice(3, 20), slice(39, 40)):
        assert np.array_equal(run(np.ascontiguousarray(x[:, part])), got[:, part])
    assert np.array_equal(run(np.zeros_like(x))[0], np.broadcast_to(addend, (40, ROWS)))


def test_outliers_are_what_the_factors_are_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored, matrix, _ = small_graph(rng.standard_normal((ROWS, COLUMNS)).astype(np.float32), 8, False, False)
    x = rng.standard_normal((1, 40, COLUMNS)).astype(np.float32)
    x[..., 7] *= 200
    errors = {}
    for strength in (0.0, 0.7):
        model = read_model(stored)
        with (tmp_path / "data").open("wb") as stream:
            maxima = {"x": np.abs(x).max((0, 1))}
            write_integers(model, candidates(model, NOTHING), maxima, NOTHING, "data", stream, strength)
        session = open_session(write_model(model), session_options(data_folder=tmp_path), where="test", remedy="")
        got = session.run(["y"], {"x": x, "input_ids": np.zeros((1, 40), np.int64)})[0]
        errors[strength] = np.abs(got[0] - x[0] @ matrix.T).std()
    assert errors[0.7] < errors[0.0] / 3


def test_a_bundles_graph_keeps_its_ports_and_what_is_not_converted(bundle: Path) -> None:
    stored, data = (bundle / "model_rows.onnx").read_bytes(), np.fromfile(bundle / "model.onnx.data", np.uint8)
    model = read_model(stored)
    found = candidates(model, data)
    assert [linear.node.name.split("/")[-2] for linear in found.linears] == ["qkv_proj", "o_proj", "gate_up_proj"] * 2
    assert [linear.node.name.split("/")[-2] for linear in found.widened] == ["down_proj"] * 2
    stream = io.BytesIO()
    largest = {value: np.ones(columns, np.float32) for value, columns in found.values.items()}
    new = write_integers(model, found, largest, data, "weights.bin", stream)
    made, before = onnx.load_from_string(write_model(model)), onnx.load_from_string(stored)
    assert [port.name for port in made.graph.input] == [port.name for port in before.graph.input]
    assert list(made.graph.output) == list(before.graph.output)
    products = [node.op_type for node in made.graph.node if node.op_type.startswith("MatMul")]
    assert sorted(products) == ["MatMulIntegerToFloat"] * 6 + ["MatMulNBits"] * 3
    assert 0 < new < stream.tell()
