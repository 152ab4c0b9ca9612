"""A bundle for Snapdragon's NPU through `edgephi.load`: never on a simulator unless its profile is named."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgephi
from edgephi.errors import BundleError, DeviceError
from edgephi.runtime.loading import load
from edgephi.runtime.placement.report import placement_report
from tests.tiny_phi import PHI_3, tiny_phi

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npu")
    source = tiny_phi(folder / "source", PHI_3, 320)
    edgephi.export(source, folder / "bundle", devices=["snapdragon-x-elite"], quantize="rtn")
    return folder / "bundle"


@pytest.mark.parametrize("device", ["auto", "npu"])
def test_the_simulator_is_never_chosen_by_itself(bundle: Path, device: str) -> None:
    with pytest.raises(DeviceError, match="only its simulator") as caught:
        load(bundle, device)
    assert caught.value.step == "device"
    assert "--device snapdragon-x-elite" in caught.value.remedy


@pytest.mark.parametrize("device", ["cpu", "gpu", "webgpu-gpu"])
def test_nothing_else_runs_it(bundle: Path, device: str) -> None:
    with pytest.raises(BundleError, match="no NPU was asked for"):
        load(bundle, device, fallback=True)


def test_another_chip_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match="compiled for Hexagon v73"):
        load(bundle, "snapdragon-x2-elite")


def test_the_simulator_answers_and_the_placement_proves_that_every_layer_is_compiled(bundle: Path) -> None:
    with load(bundle, "snapdragon-x-elite") as model:
        answer = model.generate("abc", max_new_tokens=3).result()
        nodes = model.placement.nodes_per_provider
    assert answer.new_tokens == 3
    assert answer.provider == "qnn"
    assert nodes["QNNExecutionProvider"] == len(model.manifest.npu.stages)  # type: ignore[union-attr]
    report = placement_report(bundle, "snapdragon-x-elite")
    assert report.placement is not None
    assert report.placement.nodes_per_provider == nodes
