"""A tiny Phi is compiled for Snapdragon X Elite on this machine, which has no NPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import edgephi
from edgephi.bundle import Manifest, check_bundle, read_manifest
from edgephi.devices.ai_hub.graphs import hub_graphs, require_sendable
from edgephi.devices.hexagon import installed_qairt
from tests.tiny_phi import PHI_3, PHI_4_MINI, tiny_phi

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")

CONTEXT = 320


@pytest.fixture(scope="module", params=[PHI_3, PHI_4_MINI], ids=["phi-3", "phi-4-mini"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("npu")
    source = tiny_phi(folder / "source", request.param, CONTEXT)
    manifest = edgephi.export(
        source, folder / "bundle", devices=["snapdragon-x-elite"], quantize="rtn", npu_numerics="float16"
    )
    return folder / "bundle", manifest


def test_every_node_of_every_stage_is_in_a_binary_for_the_chip(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    assert manifest.npu is not None
    assert (manifest.npu.htp_arch, manifest.npu.soc_model) == (73, 60)
    assert [stage.phase for stage in manifest.npu.stages] == ["prefill", "decode"]
    layers = manifest.model.layers
    for stage in manifest.npu.stages:
        # thirteen to a layer: two norms, four products, attention, Split, Sigmoid, two Mul, two Add; and the last norm
        assert stage.nodes == 13 * layers + 1
        assert [node.op_type for node in onnx.load(folder / stage.graph).graph.node] == ["EPContext"]
        assert (folder / stage.binary).stat().st_size > 100_000


def test_the_wheel_says_the_version_that_its_compiler_writes(exported: tuple[Path, Manifest]) -> None:
    manifest = exported[1]
    assert manifest.npu is not None
    assert manifest.npu.qairt == installed_qairt()


def test_the_bundle_is_whole_and_nothing_uncompiled_stays(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    assert read_manifest(folder) == manifest
    check_bundle(folder, manifest, every_byte=True)
    assert {path.name for path in folder.iterdir()} == {entry.path for entry in manifest.files} | {"edgephi.json"}


def test_hosted_devices_can_be_sent_every_stage(exported: tuple[Path, Manifest]) -> None:
    """What `edgephi ai-hub` reads from the graphs is what the manifest says of them."""
    folder, manifest = exported
    assert manifest.npu is not None
    graphs = hub_graphs(folder)
    for graph in graphs:
        require_sendable(graph)
    sent = {tuple(file.path for file in graph.files) for graph in graphs}
    assert sent == {(stage.graph, stage.binary) for stage in manifest.npu.stages}


@pytest.fixture(scope="module")
def in_integers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("npu")
    source = tiny_phi(folder / "source", PHI_4_MINI, CONTEXT)
    manifest = edgephi.export(source, folder / "bundle", devices=["snapdragon-x-elite"])
    return folder / "bundle", manifest


def test_w4a16_says_what_it_is_and_what_its_ranges_came_from(in_integers: tuple[Path, Manifest]) -> None:
    folder, manifest = in_integers
    assert read_manifest(folder) == manifest
    check_bundle(folder, manifest, every_byte=True)
    assert manifest.npu is not None and (manifest.npu.numerics, manifest.npu.kv_cache) == ("w4a16", "uint8")
    assert manifest.recipe.calibration is not None and manifest.recipe.calibration.tokens == 32 * 256
    assert manifest.recipe.quantize is not None
    assert (manifest.recipe.quantize.asked, manifest.recipe.quantize.picked) == ("auto", "GPTQ")
    eight, four = (group for group in manifest.recipe.weights if group.weights == "linear")
    # codes, a byte for every block of 32, and a float32 for every row of o and gate_up
    rows = (128 + 384) * manifest.model.layers
    assert four.stored_bytes == four.parameters // 2 + four.parameters // 32 + 4 * rows
    # qkv and down
    assert eight.parameters == (256 * 128 + 128 * 192) * manifest.model.layers
    assert eight.stored_bytes == eight.parameters + 4 * (256 + 128) * manifest.model.layers
    assert (four.bits, four.block_size, eight.bits, eight.block_size) == (4, 32, 8, None)
    assert four.symmetric and eight.symmetric
    assert (four.method, eight.method) == ("GPTQ, scales of two levels", "round to nearest")
    for graph in hub_graphs(folder):
        require_sendable(graph)
    assert {path.name for path in folder.iterdir()} == {entry.path for entry in manifest.files} | {"edgephi.json"}


def test_w4a16_rounds_when_asked_and_takes_its_ranges_from_a_text(tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "source", PHI_3, CONTEXT)
    (tmp_path / "text.txt").write_text("".join(chr(0x4E00 + 3 + index % 50) for index in range(600)), encoding="utf-8")
    manifest = edgephi.export(
        source,
        tmp_path / "bundle",
        devices=["snapdragon-x-elite"],
        quantize="rtn",
        calibration=tmp_path / "text.txt",
    )
    assert manifest.recipe.quantize is not None
    assert (manifest.recipe.quantize.asked, manifest.recipe.quantize.picked) == ("rtn", "rounded to nearest")
    assert manifest.recipe.calibration is not None
    assert (manifest.recipe.calibration.text, manifest.recipe.calibration.tokens) == ("text.txt", 2 * 256)
