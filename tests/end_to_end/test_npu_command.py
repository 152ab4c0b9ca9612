"""The command with a bundle for an NPU, on its simulator: JSON alone on standard output, and a measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgephi
from tests.tiny_phi import PHI_3, tiny_phi

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")

SIMULATOR = ("--device", "snapdragon-x-elite")
WORKLOAD = """
description = "Little."
[method]
warmups = 1
repetitions = 2
[load]
cold = false
repetitions = 1
[[prefill]]
text = "text.txt"
lengths = [8]
[[decode]]
text = "text.txt"
tokens = 2
depths = [0]
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npu-command")
    source = tiny_phi(folder / "source", PHI_3, 320, ascii_text=True)
    edgephi.export(source, folder / "bundle", devices=["snapdragon-x-elite"], quantize="rtn", npu_numerics="float16")
    return folder / "bundle"


def command(*words: object) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "edgephi", *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, encoding="utf-8")


def test_json_is_alone_on_standard_output(bundle: Path) -> None:
    done = command("generate", bundle, "Hello", "--json", "--max-new-tokens", 2, *SIMULATOR)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["provider"] == "qnn"
    assert "LIBNATIVE" in done.stderr, "Qualcomm's library printed nothing: this test shows nothing any more"


def test_bench_measures_it(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox " * 40, encoding="ascii")
    (tmp_path / "little.toml").write_text(WORKLOAD, encoding="utf-8")
    arguments = ("bench", bundle, *SIMULATOR, "--workload", tmp_path / "little.toml", "--no-record", "--json")
    done = command(*arguments, "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    said = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "ran on: NPU of snapdragon-x-elite, simulated on the CPU: " in said, said
    assert report["provider"] == "qnn" and not [case["reason"] for case in report["cases"] if case["reason"]]


def test_without_the_profile_bench_names_what_runs_it_here(bundle: Path) -> None:
    done = command("bench", bundle)
    assert done.returncode == 1 and "--device snapdragon-x-elite" in done.stderr
