"""A stranger's graph names no file but its bundle's own, loads nothing, and is no larger than its bytes say."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgephi
from edgephi.bundle import check_bundle, read_manifest
from edgephi.errors import BundleError
from edgephi.graph_file import check_graph
from edgephi.ort import session_options
from edgephi.runtime.loading import load
from edgephi.runtime.placement.nodes import placement
from tests.tiny_phi import PHI_4_MINI, tiny_phi
from tests.unit.test_hostile_bundle import every_route_refuses, put

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    edgephi.export(tiny_phi(folder / "checkpoint", PHI_4_MINI, context=96), folder / "bundle", quantize="rtn")
    return folder / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


def graph_with(**changes: Any) -> bytes:
    """A small model that reads `w` from model.onnx.data, changed."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones(1, np.float32), "w")
    location = changes.get("location", "model.onnx.data")
    onnx.external_data_helper.set_external_data(weight, location, offset=0, length=4)
    weight.ClearField("raw_data")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    if "op" in changes:
        node = helper.make_node(changes["op"], ["x", "w"], ["y"], domain=changes["domain"])
    initializers = [weight]
    if changes.get("where") == "attribute":
        node = helper.make_node("Constant", [], ["y"], value=weight)
        initializers = []
    if changes.get("where") == "subgraph":
        inner = helper.make_graph(
            [], "inner", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [1])], [weight]
        )
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        initializers = []
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:], initializers))
    if changes.get("where") == "function":
        inner_node = helper.make_node("Constant", [], ["y"], value=weight)
        opset = [helper.make_opsetid("", 21)]
        model.functions.append(helper.make_function("mine", "F", [], ["y"], [inner_node], opset))
        model.graph.ClearField("initializer")
    if changes.get("where") == "default":
        inner_node = helper.make_node("Constant", [], ["y"])
        inner_node.attribute.append(
            onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="v")
        )
        default = helper.make_attribute("v", weight)
        opset = [helper.make_opsetid("", 21)]
        function = helper.make_function("mine", "F", [], ["y"], [inner_node], opset, attribute_protos=[default])
        model.functions.append(function)
        model.graph.ClearField("initializer")
    for key, value in changes.get("metadata", {}).items():
        model.metadata_props.add(key=key, value=value)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph", "function", "default"])
@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/passwd",
        "secret",
        "C:\\secret",
        "*/_ORT_MEM_ADDR_/*",
        "a/../../secret",
        "",
        "./model.onnx.data",
    ],
)
def test_a_graph_reads_weights_from_the_manifests_files_alone(bundle: Path, location: str, where: str) -> None:
    (bundle / "secret").write_bytes(b"0123")
    put(bundle, "model.onnx", graph_with(location=location, where=where))
    with pytest.raises(BundleError, match="reads weights from"):
        check_bundle(bundle, read_manifest(bundle), every_byte=True)


def test_weights_beside_the_graph_are_read(bundle: Path) -> None:
    for where in ("initializer", "attribute", "subgraph"):
        put(bundle, "model.onnx", graph_with(where=where))
        check_bundle(bundle, read_manifest(bundle), every_byte=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"op": "EPContext", "domain": "com.microsoft"}, "EPContext"),
        ({"op": "Mine", "domain": "theirs"}, "domain 'theirs'"),
        ({"metadata": {"ort_config": "{}"}}, "session options of its own"),
    ],
)
def test_a_graph_that_asks_for_more_than_kernels_is_refused(bundle: Path, changes: dict[str, Any], match: str) -> None:
    put(bundle, "model.onnx", graph_with(**changes))
    every_route_refuses(bundle, match)


def repeating(operator: str, domain: str = "", *, nested: bool = False) -> bytes:
    """A graph with an operator that runs an inner graph; nested: within a branch."""
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "inner", [], [value])
    node = helper.make_node(operator, ["n", "c", "x"], ["y"], domain=domain, body=inner)
    if nested:
        branch = helper.make_graph([node], "branch", [], [value])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return bytes(helper.make_model(helper.make_graph([node], "g", [], [value])).SerializeToString())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("operator", "domain"),
    [("Loop", ""), ("Loop", "ai.onnx"), ("Scan", ""), ("SequenceMap", ""), ("BeamSearch", "com.microsoft")],
)
def test_a_graph_that_repeats_itself_is_refused(bundle: Path, operator: str, domain: str, nested: bool) -> None:
    """10^12 rounds take a hundred bytes, and nothing ends them."""
    put(bundle, "model_last_row.onnx", repeating(operator, domain, nested=nested))
    every_route_refuses(bundle, f"repeats a part of itself: the operator '{operator}'")


def calling(levels: int, calls: int = 10) -> onnx.ModelProto:
    """Functions of which each calls the one before it ten times: the graph has 10^levels nodes."""
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    model = helper.make_model(
        helper.make_graph([helper.make_node(f"F{levels}", ["x"], ["y"], domain="mine")], "g", [], [value]),
        opset_imports=opsets,
    )
    for level in range(levels + 1):
        names = ["x", *(f"t{at}" for at in range(1, calls)), "y"]
        nodes = (
            [helper.make_node(f"F{level - 1}", [a], [b], domain="mine") for a, b in itertools.pairwise(names)]
            if level
            else [helper.make_node("Sin", ["x"], ["y"])]
        )
        model.functions.append(helper.make_function("mine", f"F{level}", ["x"], ["y"], nodes, opsets))
    return model


@pytest.mark.parametrize("levels", [0, 2, 7])
def test_a_graph_with_functions_of_its_own_is_refused(bundle: Path, levels: int) -> None:
    put(bundle, "model_last_row.onnx", calling(levels).SerializeToString())
    every_route_refuses(bundle, "functions")


def test_another_folders_functions_are_counted_before_a_library_writes_them_out(tmp_path: Path) -> None:
    def look(model: onnx.ModelProto) -> None:
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        check_graph(path, may_read=lambda _: False, may_repeat=True, error=BundleError, remedy="Do not")

    look(calling(5))
    with pytest.raises(BundleError, match="more nodes"):
        look(calling(7))
    with pytest.raises(BundleError, match="more nodes"):
        look(calling(30, calls=2))
    with pytest.raises(BundleError, match="too deeply"):
        look(calling(60, calls=1))
    itself = calling(1)
    itself.functions[0].node[0].op_type, itself.functions[0].node[0].domain = "F1", "mine"
    with pytest.raises(BundleError, match="too deeply"):
        look(itself)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 40, b"\x18\x00\x00\x00ORTM" + b"\x00" * 40, b"{}"],
    ids=["empty", "field 0", "cut", "varint", "ORT format", "text"],
)
def test_what_is_no_onnx_graph_reaches_no_library(bundle: Path, content: bytes) -> None:
    put(bundle, "model.onnx", content)
    every_route_refuses(bundle, "graph")


def test_a_graph_of_countless_parts_is_given_up(bundle: Path) -> None:
    put(bundle, "model.onnx", b"\x3a\x80\x80\x80\x08" + b"\x0a\x00" * (2**24 // 2))
    started = time.perf_counter()
    with pytest.raises(BundleError, match="more parts"):
        check_bundle(bundle, read_manifest(bundle), every_byte=True)
    assert time.perf_counter() - started < 30


# what onnxruntime says of a graph

NAME = "\x1b]0;owned\x07\x1b[31mIntact\u202e"


def with_a_name(graph: Path, where: str) -> bytes:
    """A bundle's graph of which onnxruntime has something to say: while it loads (`input`), or when it fails."""
    model = onnx.load(graph, load_external_data=False)
    if where == "input":  # "initializer … appears in graph inputs"
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), NAME))
        model.graph.input.append(helper.make_tensor_value_info(NAME, TensorProto.FLOAT, [1]))
    else:
        last = next(node for node in model.graph.node if "logits" in node.output)
        last.output[list(last.output).index("logits")] = "their_before"
        model.graph.initializer.append(numpy_helper.from_array(np.array(10**6, np.int64), "their_far"))
        model.graph.node.extend(
            [
                helper.make_node("ReduceSum", ["input_ids"], ["their_sum"], keepdims=0),
                helper.make_node("Add", ["their_sum", "their_far"], ["their_index"]),
                helper.make_node("Gather", ["their_before", "their_index"], ["their_one"], axis=2, name=NAME),
                helper.make_node("ReduceSum", ["their_one"], ["their_all"], keepdims=0),
                helper.make_node("Add", ["their_before", "their_all"], ["logits"]),
            ]
        )
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("where", ["input", "run"])
@pytest.mark.parametrize("verb", ["generate", "evaluate", "doctor"])
def test_no_name_of_a_graph_reaches_the_terminal_as_it_is(bundle: Path, tmp_path: Path, where: str, verb: str) -> None:
    for name in ("model.onnx", "model_last_row.onnx", "model_rows.onnx"):
        put(bundle, name, with_a_name(bundle / name, where))
    text = tmp_path / "text.txt"
    text.write_text("a text of a few words, and of some more\n" * 20)
    arguments = {
        "generate": ["a", "--raw", "--max-new-tokens", "2", "--device", "cpu"],
        "evaluate": ["--text", str(text), "--windows", "1", "--window-length", "8"],
        "doctor": ["--device", "cpu"],
    }[verb]
    command = [sys.executable, "-m", "edgephi", verb, str(bundle), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert not set(NAME) & set("\x1b\x07\u202e") & set(said), said[-600:]
    if where == "run" and verb != "doctor":
        assert (done.returncode and "Error" in said) or "error" in said
    assert "Traceback" not in said


def test_every_session_keeps_onnxruntimes_words_from_the_terminal() -> None:
    """Their errors are exceptions too. A child's stderr is a pipe, and what is quoted from it is escaped."""
    assert session_options().log_severity_level == 4
    in_children = {"export/npu/compile_child.py", "export/npu/compile_pair.py", "export/optimum/trace.py"}
    loud = {
        file.relative_to(PROJECT).as_posix()
        for package in ("edgephi", "export", "runtime", "devices", "benchmarks")
        for file in (PROJECT / package).rglob("*.py")
        if "log_level=" in (text := file.read_text(encoding="utf-8")) and "edgephi.ort" in text
    }
    assert loud == in_children


@pytest.mark.parametrize("prepacked", ["never", "now"])
@pytest.mark.parametrize("route", ["load", "placement"])
def test_a_graph_that_was_replaced_after_the_check_is_not_run(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepacked: Any, route: str
) -> None:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))

    def check_and_replace(folder: Path, *arguments: Any, **named: Any) -> None:
        check_bundle(folder, *arguments, **named)
        for name in ("model_last_row.onnx", "model_rows.onnx"):
            model = onnx.load(folder / name, load_external_data=False)
            model.producer_name = "somebody"
            (folder / name).write_bytes(model.SerializeToString())

    monkeypatch.setattr(
        f"edgephi.runtime.placement.{'examined' if route == 'load' else 'nodes'}.check_bundle", check_and_replace
    )
    with pytest.raises(BundleError, match="was changed"):
        if route == "load":
            load(bundle, "cpu", prepacked=prepacked).close()
        else:
            placement(bundle)
    assert not list((tmp_path / "cache").glob("prepacked/*/model.onnx"))
