"""What a build for the NPU takes is measured on a model's true shape, here cut to one layer."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgephi.benchmarks.studies.npu_build import measure, table
from edgephi.bundle import NpuNumerics

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")


@pytest.mark.parametrize(("numerics", "nodes"), [("float16", 14), ("w4a16", 48)])
def test_every_binary_has_a_row_and_nothing_stays(tmp_path: Path, numerics: NpuNumerics, nodes: int) -> None:
    build = measure("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path, 1, "snapdragon-x-elite", 32, numerics)
    assert [(one.name, one.layers, one.nodes) for one in build.binaries] == [
        ("prefill_0_1", 1, nodes),
        ("decode_0_1", 1, nodes),
    ]
    # 49,152 x 576 in the embedding, 3.5 million in a layer, two bytes each
    assert build.weights_bytes == pytest.approx(2 * (49152 * 576 + 3.54e6), rel=0.01)
    # 3.5 million weights of 4 or 8 bits, and the compiler may unpack some
    for one in build.binaries:
        assert 1.7e6 < one.bytes < 16e6
        assert 0 < one.seconds < build.seconds
        assert one.peak_bytes <= build.peak_bytes
    assert build.bundle_bytes > sum(one.bytes for one in build.binaries)
    lines = table(build).splitlines()
    assert [line.split("|")[1].split(":")[0].strip() for line in lines[2:]] == [
        "prefill_0_1",
        "decode_0_1",
        "compiled",
        "whole export",
    ]
    assert not build.continued
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_was_killed_goes_on_behind_its_last_binary(tmp_path: Path) -> None:
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    command = [
        sys.executable,
        "-m",
        "edgephi.benchmarks.studies.npu_build",
        model,
        "--folder",
        str(tmp_path),
        "--layers",
        "1",
        "--numerics",
        "float16",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline, found = time.monotonic() + 120, []
    while not found:
        assert process.poll() is None and time.monotonic() < deadline
        found = list(tmp_path.glob("npu-build-*/.exported.partial/uncompiled/prefill_0_1.onnx"))
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert psutil.wait_procs(family, 10)[1] == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgephi.benchmarks.studies.npu_build.make_checkpoint", lambda *given: pytest.fail("made again"))
        build = measure(model, tmp_path, 1, "snapdragon-x-elite", 32, "float16")
    assert build.continued
    assert len(build.files) == len(build.binaries) == 2
    assert list(tmp_path.iterdir()) == []
