"""The README and the documentation keep their promises: every command in them is one this test suite runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lora import SMOLLM2, random_adapter

PROJECT = Path(__file__).resolve().parents[2]
README = PROJECT / "README.md"
HEAVY = (
    # an environment with torch, or many minutes of work: their parts have their own tests
    "--builder-python",
    "--llama-python",
    "--quantize gptq",
    "--target-size",
    "--wheels",
    "--prefill integers",
    "--workload growth",
    "--choices",
    "bench lab.toml",
    "--scheduler",
    "edgephi.benchmarks.studies.cpu_engine",
    "edgephi.benchmarks.studies.integer_prefill",
    "edgephi.benchmarks.studies.kv_cache",
    "edgephi.benchmarks.studies.quantization_sweep",
    "edgephi.benchmarks.studies.gptq_layer",
    "edgephi.benchmarks.studies.grammar_cost",
    "edgephi.benchmarks.studies.gpu_check",
    "edgephi.benchmarks.studies.last_words",
    "edgephi.benchmarks.studies.layer_growth",
    "edgephi.benchmarks.studies.lora_cost",
    "edgephi.benchmarks.studies.npu_build",
    "edgephi.benchmarks.studies.npu_quality",
    "edgephi.benchmarks.studies.offgrid",
    "edgephi.benchmarks.studies.og_overhead",
    "edgephi.benchmarks.studies.skills",
    "edgephi.benchmarks.studies.server_load",
    "edgephi.benchmarks.studies.spinning",
)
"""What marks a command that is only checked with --help."""


def pages() -> list[Path]:
    """The README, then docs/ in the order of the site's navigation, then how it is measured."""
    navigation = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\nplugins:\n")[0]
    docs = [PROJECT / "docs" / name for name in re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)]
    return [README, *docs, PROJECT / "benchmarks" / "README.md"]


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Lines of the pages' ```sh blocks in their order; a command that several pages show counts once."""
    lines = [line for page in pages() for block in blocks("sh", page) for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


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


@pytest.mark.timeout(1500)  # two minutes of processor time; other processes may have most of the machine
def test_every_other_command_runs(smollm2_gguf: Path, fixtures: Path, shared_data: Path, tmp_path: Path) -> None:
    """In the pages' order, in one folder, with their file names standing for small real files."""
    os.link(smollm2_gguf, tmp_path / smollm2_gguf.name) if same_device(smollm2_gguf, tmp_path) else shutil.copy(
        smollm2_gguf, tmp_path
    )
    (tmp_path / "text.txt").write_text(
        (shared_data / "wikitext2" / "test.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8"
    )
    # what the heavy commands name, who look for it before anything else
    for folder in ("growth", "npu-build", "llama/bin", "builder/bin", "openvino/bin"):
        (tmp_path / folder).mkdir(parents=True)
        if folder.endswith("bin"):
            (tmp_path / folder / "python").symlink_to(sys.executable)
    (tmp_path / "piqa.jsonl").touch()
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    random_adapter(tmp_path / "support-lora", SMOLLM2, layers=30, strength=0.002, base_model_name_or_path=name)
    environment = os.environ | {"EDGEPHI_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    environment |= {"EDGEPHI_SMOLLM2": str(smollm2_gguf), "EDGEPHI_HISTORY": str(tmp_path / "history.jsonl")}
    for command in commands()[2:]:
        if command in npu_commands():
            continue
        if command.startswith("edgephi export microsoft/"):
            done = run(command, tmp_path, environment)
            assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr, "a hub id is looked for only when online"
            continue
        heavy = any(mark in command for mark in HEAVY)
        done = run(f"{command} --help" if heavy else command, tmp_path, environment)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for page in pages():
        for block in blocks("python", page):
            done = run(f"python -c {shlex.quote(with_small_files(block))}", tmp_path, environment)
            assert done.returncode == 0 and "Tokyo" in done.stdout, f"{page.name}\n{block}\n{done.stderr}"


def with_small_files(script: str) -> str:
    """A page's Python with the demo's weights in the place of Phi's, and each export in a new folder."""
    script = script.replace("microsoft/Phi-4-mini-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if found := re.search(r'edgephi\.export\w*\(.*, "(.+)"\)', script):
        script = script.replace(f'"{found[1]}"', f'"{found[1]}-python"')
    return script


def same_device(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "benchmarks/README.md"])
def test_the_documents_it_points_to_exist(name: str) -> None:
    assert (README.parent / name).is_file()
    assert name in README.read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 900
