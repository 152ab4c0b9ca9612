"""An export for the NPU that is ended leaves no compiler at work, and the next one goes on from what it left."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import edgephi
from edgephi.bundle import check_bundle
from tests.tiny_phi import PHI_3, tiny_phi

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")

LARGE = PHI_3 | {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
"""A stage of two such layers compiles for more than a second."""


def compiler_of(process: subprocess.Popen[bytes], stage: str, folder: Path) -> psutil.Process:
    """The child that compiles, once the stage's graph is there and the compiler is at work."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the export ended first"
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children():
                compiles = any("compile_child" in word for word in child.cmdline())
                if compiles and (folder / "uncompiled" / f"{stage}.onnx").exists() and child.cpu_times().user > 0.3:
                    return child
        time.sleep(0.01)
    raise AssertionError("nothing compiles")


def test_a_killed_export_takes_the_compiler_with_it_and_the_next_goes_on(tmp_path: Path) -> None:
    source, partial = tiny_phi(tmp_path / "source", LARGE, 1024), tmp_path / ".bundle.partial"
    command = [sys.executable, "-m", "edgephi", "export", str(source), "-o", str(tmp_path / "bundle")]
    process = subprocess.Popen(
        [*command, "--device", "snapdragon-x-elite", "--quantize", "rtn", "--npu-numerics", "float16"]
    )
    compiler = compiler_of(process, "decode_0_2", partial)
    process.kill()
    process.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        compiler.wait(30)
    (binary,) = partial.glob("*_qnn.bin")
    prompts = binary.stat().st_mtime_ns
    manifest = edgephi.export(
        source, tmp_path / "bundle", devices=["snapdragon-x-elite"], quantize="rtn", npu_numerics="float16"
    )
    check_bundle(tmp_path / "bundle", manifest, every_byte=True)
    assert (tmp_path / "bundle/prefill_0_2_qnn.bin").stat().st_mtime_ns == prompts  # compiled once
    assert {path.name for path in tmp_path.iterdir()} == {"source", "bundle"}
    files = {entry.path for entry in manifest.files}
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == files | {"edgephi.json"}
