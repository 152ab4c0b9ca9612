"""onnxruntime runs on the CPU without a word in many ways: each is an error here, and the error says what to do.

What the traps are is in the comments; what a test plays is the runtime that springs them.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgephi.bundle import GraphEntry
from edgephi.devices.providers import DeviceInfo
from edgephi.devices.providers.base import HARDWARE
from edgephi.errors import DeviceError
from edgephi.export.weights.recipe import make_recipe
from edgephi.ort import session_options
from edgephi.runtime.engines.genai_settings import require_device
from edgephi.runtime.placement import probe
from edgephi.runtime.placement.nodes import Kept, Placement, ProviderNodes, read_placement
from edgephi.runtime.placement.place import Place, ProviderChoice
from edgephi.runtime.placement.probe import compute_one_token, pick_device, require_placed, require_rows_read, try_graph
from tests.decoding import build_graph_with
from tests.unit.test_house import PACKAGES, PROJECT

CPU, WEBGPU = "CPUExecutionProvider", "WebGpuExecutionProvider"


@pytest.fixture(scope="module")
def graph(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    return build_graph_with(fixtures / "phi3-mha", folder, make_recipe("int4", 32, accuracy_level=1))


def device(kind: str = "gpu") -> DeviceInfo:
    raw = SimpleNamespace(device=SimpleNamespace(type=SimpleNamespace(name="GPU")))
    return DeviceInfo(WEBGPU, kind, "a vendor", 1, 2, {}, raw)  # type: ignore[arg-type]


def caught(step: str, function: Callable[[], object]) -> str:
    with pytest.raises(DeviceError) as error:
        function()
    assert error.value.step == step
    assert error.value.remedy
    return str(error.value)


def playing(monkeypatch: pytest.MonkeyPatch, session: Callable[..., object]) -> None:
    """onnxruntime with a session of ours, and a GPU that is listed."""
    monkeypatch.setattr(probe, "register", lambda short: (device(),))
    monkeypatch.setattr(probe, "session_options", lambda **named: SimpleNamespace(has_providers=lambda: True))
    monkeypatch.setattr(ort, "InferenceSession", session)


# A plug-in provider that fails while a session is made: onnxruntime's Python API makes it again, on the CPU.


def test_a_provider_that_fails_at_construction(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def session(path: Path, options: object, **arguments: object) -> object:
        assert arguments == {"enable_fallback": 0}, "the API would try again on the CPU"
        raise RuntimeError("shader compiler: out of memory")

    playing(monkeypatch, session)
    said = caught("nodes", lambda: try_graph(str(graph), "webgpu", {}, ["gpu"]))
    assert "shader compiler" in said


# WebGPU's attention takes the rows of rotary tables by which a graph chooses between two ropes, and does not read them.


def test_a_graph_whose_row_numbers_the_provider_does_not_read(fixtures: Path, tmp_path: Path) -> None:
    graph = build_graph_with(fixtures / "phi3-longrope-long", tmp_path, make_recipe("int8", 32))
    said = caught("graph", lambda: require_rows_read("webgpu", graph))
    assert "Export the model again" in said
    require_rows_read("cpu", graph)


# One that fails in run(): the same, unless disable_fallback() was called.


def test_a_provider_that_fails_in_run(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        allowed = True

        def __init__(self, path: Path, options: object, enable_fallback: int) -> None: ...

        def disable_fallback(self) -> None:
            self.allowed = False

        def get_inputs(self) -> list[object]:
            return []

        def run(self, names: list[str], feeds: dict[str, object]) -> list[object]:
            assert not self.allowed, "the API would run on the CPU"
            raise RuntimeError("device lost")

    playing(monkeypatch, Session)
    everything = Placement("model.onnx", (WEBGPU,), (ProviderNodes(WEBGPU, 9, {}, 0),))
    monkeypatch.setattr(probe, "read_placement", lambda session, path, requested: everything)
    said = caught("nodes", lambda: try_graph(str(graph), "webgpu", {}, ["gpu"]))
    assert "device lost" in said


# The list of providers: what a session was asked for, whoever computes. A provider this build lacks is left out of it
# with a warning and no error; a plug-in that is registered, but was not given a device, without even that.


def test_the_division_is_believed_and_not_the_list(graph: Path) -> None:
    options = session_options(record_placement=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = ort.InferenceSession(graph, options, providers=["QNNExecutionProvider", CPU])
    placed = read_placement(session, graph, ("QNNExecutionProvider", CPU))
    said = caught("nodes", lambda: require_placed(placed, graph))
    assert "took none of the graph's nodes" in said


def test_nodes_that_compute_and_stay_on_the_cpu_are_named(graph: Path) -> None:
    parts = (ProviderNodes(WEBGPU, 20, {"Mul": 20}, 0), ProviderNodes(CPU, 9, {"MatMul": 9}, 7))
    counting = Kept("Shape", 1, 0, "integers", "counts")
    matmul = Kept("MatMul", 9, 7, "operator", f"{WEBGPU} took no MatMul of this graph")
    require_placed(Placement("model.onnx", (WEBGPU,), parts, (counting,)), graph)
    said = caught("nodes", lambda: require_placed(Placement("model.onnx", (WEBGPU,), parts, (matmul,)), graph))
    assert "9 MatMul" in said
    assert "--device cpu" in said


def test_every_cause_is_read_from_the_graph(graph: Path) -> None:
    """A session on the CPU, asked as if WebGPU had been wanted: all nodes stayed, for three reasons."""
    session = ort.InferenceSession(graph, session_options(record_placement=True), providers=[CPU])
    kept = {one.op_type: one for one in read_placement(session, graph, (WEBGPU, CPU)).kept}
    assert {kept[name].cause for name in ("Shape", "ReduceSum", "Sub", "Cast")} == {"integers"}
    assert kept["com.microsoft::GatherBlockQuantized"].cause == "lookup"
    assert kept["com.microsoft::MatMulNBits"].cause == "operator"
    assert kept["com.microsoft::MatMulNBits"].weight_bytes > 0


def test_the_weights_of_a_graph_are_the_bytes_of_its_data_file(graph: Path) -> None:
    session = ort.InferenceSession(graph, session_options(record_placement=True), providers=[CPU])
    (cpu,) = read_placement(session, graph, (CPU,)).providers
    size = (graph.parent / "model.onnx.data").stat().st_size
    assert 0.9 * size < cpu.weight_bytes <= size


# A provider that computes nonsense.


def test_logits_that_are_not_finite(graph: Path) -> None:
    port = SimpleNamespace(name="past_key_values.0.key", type="tensor(float16)", shape=["b", 2, "p", 8])

    class Session:
        def get_inputs(self) -> list[object]:
            return [SimpleNamespace(name="input_ids", type="tensor(int64)", shape=["b", "s"]), port]

        def run(self, names: list[str], feeds: dict[str, Any]) -> list[object]:
            assert feeds["past_key_values.0.key"].shape == (1, 2, 0, 8)
            return [np.array([np.nan])]

    assert "not finite" in caught("nodes", lambda: compute_one_token(Session(), graph, WEBGPU))  # type: ignore[arg-type]


# Simulators and software drivers call themselves by the provider's name.


def test_a_simulator_is_no_accelerator() -> None:
    assert pick_device("webgpu", [device("gpu-software"), device("gpu")], HARDWARE).kind == "gpu"
    said = caught("device", lambda: pick_device("webgpu", [device("gpu-software")], HARDWARE))
    assert "only gpu-software" in said


# onnxruntime-genai: `is_webgpu_available()`, `is_qnn_available()` and `is_openvino_available()` return True always. A
# selection policy takes what it finds, and fails once QNN is registered.


def test_nothing_asks_functions_that_always_agree() -> None:
    forbidden = {"is_webgpu_available", "is_qnn_available", "is_openvino_available", "is_dml_available"}
    forbidden |= {"set_provider_selection_policy"}
    for folder in (PROJECT / "edgephi", *PACKAGES.values()):
        for file in folder.rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not called & forbidden, file


def test_onnxruntime_genai_on_another_device_than_asked() -> None:
    place = Place(ProviderChoice("webgpu", GraphEntry(device="webgpu", file="model_webgpu.onnx")))
    require_device("WebGPU", place)
    assert "loaded the graph on CPU" in caught("device", lambda: require_device("CPU", place))
    on_cpu = replace(place, choice=replace(place.choice, provider="cpu"))
    require_device("CPU", on_cpu)
    assert "loaded the graph on CUDA" in caught("device", lambda: require_device("CUDA", on_cpu))
