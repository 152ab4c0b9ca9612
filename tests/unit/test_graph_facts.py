"""What is read of a graph without onnx, held against a graph that onnx wrote."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgephi.runtime.placement.graph_facts import read_compiled, read_graph
from edgephi.runtime.placement.graph_parts import MOST_DIMENSIONS, read_node, read_tensor


def external(name: str, kind: int, offset: int, length: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "model.onnx.data"), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    nodes = [
        helper.make_node("Cast", ["scales16"], ["scales32"], "widen", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scales32", "two"], ["scales"], "double"),
        helper.make_node("MatMulNBits", ["hidden", "codes", "scales"], ["out"], "linear", domain="com.microsoft"),
        helper.make_node("Cast", ["ids"], ["ids32"], "to int32", to=TensorProto.INT32),
        helper.make_node("Add", ["ids32", "one"], ["more"], "count"),
        helper.make_node("Cast", ["more"], ["floats"], "to float", to=TensorProto.FLOAT),
        helper.make_node("Shape", ["hidden"], ["shape"], "measure"),
        helper.make_node("GroupQueryAttention", [*"abcdefghi", "ids"], ["h"], "attention", domain="com.microsoft"),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [
                helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "n"]),
                helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [1, "n", 4]),
            ],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
            [
                external("scales16", TensorProto.FLOAT16, 0, 8),
                external("codes", TensorProto.UINT8, 4096, 4),
                helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0]),
                helper.make_tensor("one", TensorProto.INT32, [1], [1]),
            ],
        )
    )
    file = tmp_path / "model.onnx"
    onnx.save(model, str(file))
    return file


def test_weights_are_found_through_casts_and_products(graph: Path) -> None:
    assert read_graph(graph).weights == {"linear": {(4096, 4), (0, 8)}}


def test_nodes_that_only_count_are_told_from_those_that_compute(graph: Path) -> None:
    assert read_graph(graph).integer_nodes == {"to int32", "count", "measure"}


def test_a_graph_that_names_rows_says_so(graph: Path) -> None:
    assert read_graph(graph).row_numbers


def test_the_graph_around_a_binary_is_read(tmp_path: Path) -> None:
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="stage.bin", main=1)
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    model.metadata_props.add(key="chip", value="73")
    file = tmp_path / "stage.onnx"
    onnx.save(model, str(file))
    read = read_compiled(file)
    assert (read.operators, read.binaries, read.metadata) == (("EPContext",), ("stage.bin",), {"chip": "73"})


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x3a\x7fshort")
    with pytest.raises(ValueError, match="too early"):
        read_graph(tmp_path / "model.onnx")


def test_dimensions_are_read_packed_or_one_by_one() -> None:
    loose = helper.make_tensor("t", TensorProto.FLOAT, [300, 2], [0.0] * 600).SerializeToString()
    assert read_tensor(memoryview(loose)).shape == (300, 2)
    assert read_tensor(memoryview(b"\x0a\x03\xac\x02\x02")).shape == (300, 2)


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        (external("t", TensorProto.FLOAT, -8, 8).SerializeToString(), "no place"),
        (external("t", TensorProto.FLOAT, 0, -1).SerializeToString(), "no place"),
        (external("t", TensorProto.FLOAT, 0, 8).SerializeToString().replace(b"length", b"lenght"), "no place"),
        (TensorProto(dims=[1] * (MOST_DIMENSIONS + 1)).SerializeToString(), "more dimensions"),
        (b"\x0a\x64" + b"\x01" * 100, "more dimensions"),
        (b"\x0a\x0b" + b"\xff" * 11, "64 bits"),
        (b"\x0a\x02\xff\xff", "too early"),
    ],
)
def test_a_tensor_without_bounds_is_refused(stored: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_tensor(memoryview(stored))


def test_of_attributes_with_one_name_the_last_counts() -> None:
    node = helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT)
    node.attribute.add(name="to", i=TensorProto.INT64, type=onnx.AttributeProto.INT)
    read = read_node(memoryview(node.SerializeToString()))
    assert (read.integer("to"), read.text("to"), read.integer("from")) == (TensorProto.INT64, "", None)
