"""What the NPU's compiler leaves undone, and what was changed on the way to the device, are sentences."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
import time
from pathlib import Path

import onnx
import onnx_ir as ir
import psutil
import pytest

import edgephi
from edgephi.bundle import MANIFEST
from edgephi.devices.hexagon import installed_qairt, target_of
from edgephi.devices.profile import load_profile
from edgephi.errors import BundleError, DeviceError, UnsupportedModelError, UsageError
from edgephi.export.npu.compile import compile_stage
from edgephi.runtime.engines.npu import open_npu
from edgephi.runtime.engines.npu_checks import Chip
from edgephi.runtime.loading import load
from tests.tiny_phi import PHI_3, tiny_phi

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")

X_ELITE = target_of(load_profile("snapdragon-x-elite"))
STAGE = "decode_0_1"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("npu") / "source", PHI_3 | {"num_hidden_layers": 1}, 128)


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    edgephi.export(source, source.parent / "bundle", devices=["snapdragon-x-elite"], quantize="rtn")
    return source.parent / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def small_graph(path: Path, op: str, **attributes: float) -> Path:
    """One node of com.microsoft, called /suspect, after a Relu that the NPU takes."""
    half = ir.TensorType(ir.DataType.FLOAT16)
    values = {name: ir.Value(name=name, type=half, shape=ir.Shape([1, 4, 32])) for name in ("x", "skip", "relu", "y")}
    gain = ir.Value(name="gain", type=half, shape=ir.Shape([32]))
    gain.const_value = ir.tensor([1.0] * 32, dtype=ir.DataType.FLOAT16, name="gain")
    nodes = [
        ir.Node("", "Relu", [values["x"]], outputs=[values["relu"]], name="/relu"),
        ir.Node(
            "com.microsoft",
            op,
            [values["relu"], values["skip"], gain],
            [ir.AttrFloat32(name, number) for name, number in attributes.items()],
            outputs=[values["y"]],
            name="/suspect",
        ),
    ]
    graph = ir.Graph(
        [values["x"], values["skip"]],
        [values["y"]],
        nodes=nodes,
        initializers=[gain],
        opset_imports={"": 21, "com.microsoft": 1},
        name="small",
    )
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def test_a_node_the_npu_does_not_take_is_named_with_the_compilers_reason(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "small.onnx", "SkipSimplifiedLayerNormalization", epsilon=1e-5)
    (tmp_path / "work").mkdir()
    with pytest.raises(
        DeviceError, match=r"does not take SkipSimplifiedLayerNormalization .*/suspect in small.onnx"
    ) as error:
        compile_stage(graph, tmp_path / "compiled.onnx", X_ELITE, tmp_path / "work")
    assert error.value.step == "nodes"


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "small.onnx", "SkipSimplifiedLayerNormalization", epsilon=1e-5)
    (tmp_path / "compiled_qnn.bin").write_bytes(b"mine")
    with pytest.raises(DeviceError, match=r"compiled_qnn\.bin"):
        compile_stage(graph, tmp_path / "compiled.onnx", X_ELITE, tmp_path)
    assert (tmp_path / "compiled_qnn.bin").read_bytes() == b"mine"


def test_a_graph_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(DeviceError, match=r"broken\.onnx"):
        compile_stage(tmp_path / "broken.onnx", tmp_path / "compiled.onnx", X_ELITE, tmp_path)


def kill_the_compiler() -> None:
    """What a system does that runs out of memory."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if any("compile_child" in word for word in child.cmdline()):
                    child.kill()
                    return
        time.sleep(0.001)


def test_a_compiler_that_is_killed_is_a_sentence_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    killer = threading.Thread(target=kill_the_compiler)
    killer.start()
    with pytest.raises(
        DeviceError, match=r"compiler did not finish: the process died: .* \(prefill_0_1.onnx\)\. Free memory"
    ) as error:
        edgephi.export(source, tmp_path / "bundle", devices=["snapdragon-x-elite"])
    killer.join()
    assert error.value.step == "process"
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_whole_blocks_are_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    odd = tiny_phi(tmp_path / "odd", PHI_3 | {"intermediate_size": 176}, 128)
    with pytest.raises(UnsupportedModelError, match=r"rows of 176 .* blocks of 32 \(layers.0.down.weight\)"):
        edgephi.export(odd, tmp_path / "bundle", devices=["snapdragon-x-elite"], quantize="rtn", npu_numerics="float16")
    smaller = tmp_path / "blocks of 16"
    edgephi.export(odd, smaller, devices=["snapdragon-x-elite"], quantize="rtn", npu_numerics="float16", block_size=16)
    # in w4a16 that weight has 8 bits and a scale for each row
    edgephi.export(odd, tmp_path / "bundle", devices=["snapdragon-x-elite"], quantize="rtn")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"precision": "fp16"}, "int4 weights"),
        ({"block_size": 256}, "up to 128"),
        ({"bits": 5.0}, "one size of block"),
        ({"devices": ["snapdragon-x-elite", "webgpu"]}, "another device"),
    ],
)
def test_arguments_the_npu_has_no_graph_for(
    source: Path, tmp_path: Path, arguments: dict[str, object], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        edgephi.export(source, tmp_path / "bundle", **{"devices": ["snapdragon-x-elite"]} | arguments)
    assert not (tmp_path / "bundle").exists()


def test_a_changed_byte_of_the_binary_is_found(bundle: Path) -> None:
    path = bundle / f"{STAGE}_qnn.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"SHA-256.*_qnn\.bin"):
        open_npu(bundle, "npu-simulator")


def rewrite(bundle: Path, name: str, data: bytes) -> None:
    """Change a file and the manifest with it, as somebody could who hands a bundle on."""
    (bundle / name).write_bytes(data)
    manifest = json.loads((bundle / MANIFEST).read_text())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_a_damaged_binary_cannot_take_this_process_with_it(bundle: Path) -> None:
    name = f"{STAGE}_qnn.bin"
    data = bytearray((bundle / name).read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    rewrite(bundle, name, bytes(data))
    with pytest.raises(DeviceError) as error:
        open_npu(bundle, "npu-simulator")
    assert error.value.step == "process"


def test_a_graph_that_runs_another_binary_is_refused(bundle: Path) -> None:
    model = onnx.load(bundle / f"{STAGE}.onnx")
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "ep_cache_context":
            attribute.s = b"../elsewhere.bin"
    rewrite(bundle, f"{STAGE}.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match=f"does not run {STAGE}_qnn.bin"):
        open_npu(bundle, "npu-simulator")


def test_a_binary_for_another_chip_than_the_manifest_says_is_refused(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["npu"] |= {"htp_arch": 81, "soc_model": 88}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"is for v73, chip 60, .* says v81, chip 88"):
        open_npu(bundle, "npu-simulator")


def test_binaries_of_a_newer_runtime_than_the_installed_one_are_refused(bundle: Path) -> None:
    """The manifest and the graph agree; the wheel that is installed is older than both."""
    model = onnx.load(bundle / f"{STAGE}.onnx")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["npu"]["qairt"] = "99.0.0"
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    for entry in model.metadata_props:
        entry.value = entry.value.replace(installed_qairt() or "", "99.0.0")
    rewrite(bundle, f"{STAGE}.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match=r"compiled by QAIRT 99\.0\.0, and the older 2\.\d+\.\d+ is installed"):
        open_npu(bundle, "npu-simulator")


def test_a_bundle_for_another_chip_than_the_machines_is_refused(exported: Path) -> None:
    with pytest.raises(BundleError, match=r"compiled for Hexagon v73, chip 60 .* this machine has v81, chip 88"):
        open_npu(exported, "npu-simulator", chip=Chip(81, 88))


def test_the_simulator_is_no_npu(exported: Path) -> None:
    with pytest.raises(DeviceError, match="no NPU") as error:
        open_npu(exported, "npu")
    assert error.value.step == "device"


def test_nothing_runs_the_bundle_on_the_cpu_instead(exported: Path) -> None:
    with pytest.raises(BundleError, match="no NPU was asked for"):
        load(exported, "cpu")
