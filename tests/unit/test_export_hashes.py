"""The script that compares the exports of two commits byte by byte."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import edgephi
from edgephi.benchmarks.studies.export_hashes import differences
from tests.tiny_phi import PHI_3, tiny_phi

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = PROJECT / "benchmarks" / "studies" / "export_hashes.py"


def hashes(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    return done.returncode, done.stdout + done.stderr


def test_hashes_are_those_of_what_an_export_writes(fixtures: Path, tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "source", PHI_3, 320)
    shutil.copytree(fixtures / "llama-gqa", tmp_path / "fixtures" / "llama-gqa")
    status, said = hashes(source, "--fixtures", tmp_path / "fixtures", "--json", tmp_path / "before.json")
    assert status == 0, said
    found = json.loads((tmp_path / "before.json").read_text(encoding="utf-8"))
    assert len(found) == 4 * 3 + 6 * 3
    edgephi.export(source, tmp_path / "bundle", quantize="rtn", devices=["cpu", "webgpu"])
    files = {path.name for path in (tmp_path / "bundle").iterdir()} - {"edgephi.json"}
    assert found["source, int4 rtn, webgpu"] == {
        name: hashlib.sha256((tmp_path / "bundle" / name).read_bytes()).hexdigest() for name in files
    }
    assert set(found["source, fp32, directml"]) == {"refused"}
    assert not [
        export
        for export, files in found.items()
        if "refused" in files and not export.startswith("source, fp") and ", fp" not in export
    ]

    found["source, fp32, cpu"]["model.onnx"] = "another"
    (tmp_path / "before.json").write_text(json.dumps(found), encoding="utf-8")
    status, said = hashes(source, "--fixtures", tmp_path / "fixtures", "--compare", tmp_path / "before.json")
    assert status == 1 and "\nsource, fp32, cpu: model.onnx\n30 exports, differences: 1" in said


def test_what_only_one_side_has_is_a_difference() -> None:
    before = {"a": {"x": "1", "y": "2"}, "b": {"x": "1"}}
    assert differences(before, before) == []
    assert differences(before, {"a": {"x": "1", "z": "2"}}) == ["a: y", "a: z", "b: x"]
