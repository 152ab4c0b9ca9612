"""The README's commands for Snapdragon, with a tiny Phi in the place of Phi-4-mini."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.tiny_phi import PHI_4_MINI, tiny_phi
from tests.unit.test_readme import npu_commands, run

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")


def test_every_command_does_what_the_readme_says_of_it(tmp_path: Path) -> None:
    tiny_phi(tmp_path / "phi", PHI_4_MINI, 320)
    environment = os.environ | {"EDGEPHI_CACHE": str(tmp_path / "cache"), "COLUMNS": "120"}
    seen = []
    for command in npu_commands():
        done = run(command.replace("microsoft/Phi-4-mini-instruct", "phi"), tmp_path, environment)
        if command.endswith("--device npu"):
            assert done.returncode == 1 and "only its simulator" in done.stderr, "there is no such chip here"
            seen.append("refused")
        else:
            assert done.returncode == 0, failure(command, done)
            seen.append(command.split()[1])
    assert seen == ["export", "refused", "generate", "export", "generate", "export"]


def failure(command: str, done: subprocess.CompletedProcess[str]) -> str:
    return f"{command}\n{done.stdout}\n{done.stderr}"
