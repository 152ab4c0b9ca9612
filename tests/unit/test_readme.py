"""The README keeps its promises: every command in it is one this test suite runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def commands() -> list[str]:
    """Lines of the README's ```sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def npu_commands() -> list[str]:
    """Those that need the NPU's compiler, which `tests/end_to_end/test_npu_readme.py` runs."""
    return [command for command in commands() if "snapdragon" in command or "--device npu" in command]


def test_the_two_commands_come_first() -> None:
    assert commands()[:2] == ["pip install -e . && edgephi demo", 'pip install -e ".[test]" && pytest']


def run(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    if words[0] == "edgephi":
        words = [sys.executable, "-m", "edgephi", *words[1:]]
    elif words[0] == "python":
        words[0] = sys.executable
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", input="Hello\n/exit\n"
    )


def test_every_other_command_runs(smollm2_gguf: Path, fixtures: Path, shared_data: Path, tmp_path: Path) -> None:
    """In the README's order, in one folder, with its file names standing for small real files."""
    os.link(smollm2_gguf, tmp_path / smollm2_gguf.name) if same_device(smollm2_gguf, tmp_path) else shutil.copy(
        smollm2_gguf, tmp_path
    )
    (tmp_path / "text.txt").write_text(
        (shared_data / "wikitext2" / "test.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8"
    )
    environment = os.environ | {"EDGEPHI_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    environment["EDGEPHI_SMOLLM2"] = str(smollm2_gguf)
    for command in commands()[2:]:
        if command in npu_commands():
            continue
        if command.startswith("edgephi export microsoft/"):
            done = run(command, tmp_path, environment)
            assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr, "a hub id is looked for only when online"
            continue
        if any(word in command for word in ("--builder-python", "four_bits", "gptq_layer", "npu_", "peers")):
            # an environment with torch, or many minutes of work: their parts have their own tests
            script = re.findall(r"edgephi\.benchmarks\.\w+", command)[0]
            done = run(f"python -m {script} --help", tmp_path, environment)
        else:
            done = run(command, tmp_path, environment)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def same_device(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "benchmarks/README.md"])
def test_the_documents_it_points_to_exist(name: str) -> None:
    assert (README.parent / name).is_file()
    assert name in README.read_text(encoding="utf-8")
