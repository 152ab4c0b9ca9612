"""A file, folder or interpreter that is not there is a sentence, before any work: for every argument that names one."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import edgephi
from edgephi.benchmarks import arguments
from edgephi.commands.app import app
from edgephi.errors import EdgephiError
from tests.tiny_phi import PHI_3, tiny_phi

LONGEST_S = 3.0
MISSING = "?"
"""Stands for what is not there."""
PHI = "microsoft/Phi-4-mini-instruct"
STUDIES: dict[str, list[str]] = {
    # each argument that names something is missing once
    "studies.cpu_engine": ["?", "@bundle --json ?/x.json", "@bundle --restore ?"],
    "studies.export_cost": [
        "? --builder-python @python",
        "@text --builder-python ?",
        "@text --builder-python @python --folder ?",
        "@text --builder-python @python --scratch ?",
        "@text --builder-python @python --json ?/x.json",
    ],
    "studies.export_hashes": ["./?", "--fixtures ?", "--compare ?", "--json ?/x.json"],
    "studies.gptq_layer": ["?"],
    "studies.gpu_check": ["? --output @new", "--folder ? --output @new", "@bundle --output @text"],
    "studies.grammar_cost": ["?", "@folder"],
    "studies.kv_cache": ["? @text", "@bundle ?", "@bundle @text --json ?/x.json"],
    "studies.large_export": ["? --folder @folder", f"{PHI} --folder ?", f"{PHI} --folder @folder --json ?/x.json"],
    "studies.last_words": ["? --text @text", "@bundle --text ?"],
    "studies.layer_growth": ["--folder ?", "--folder @folder --model ?"],
    "studies.npu_build": [
        "? --folder @folder",
        f"{PHI} --folder ?",
        f"{PHI} --folder @folder --device ?.toml",
        f"{PHI} --folder @folder --json ?/x.json",
    ],
    "studies.npu_quality": [
        "./? --reference @bundle --text @text --folder @new",
        "@folder --reference ? --text @text --folder @new",
        "@folder --reference @bundle --text ? --folder @new",
        "@folder --reference @bundle --text @text --folder @text",
        "@folder --reference @bundle --text @text --folder @new --device ?.toml",
    ],
    "studies.offgrid": [
        "? --text @text --folder @new",
        "@text --text ? --folder @new",
        "@text --text @text --folder @text",
        "@text --text @text --folder @new --llama-python ?",
    ],
    "studies.og_overhead": ["?", "@bundle --json ?/x.json"],
    "studies.quality": [
        "? --reference @bundle --text @text",
        "@bundle --reference ? --text @text",
        "@bundle --reference @bundle --text ?",
    ],
    "studies.quantization_sweep": [
        "./? --text @text --folder @new",
        "@folder --text ? --folder @new",
        "@folder --text @text --folder @text",
        "@folder --text @text --folder @new --choices ?",
    ],
    "studies.spinning": ["?"],
    "compare_runtimes.__main__": [
        "? --text @text --folder @new --output @new",
        "@text --text ? --folder @new --output @new",
        "@text --text @text --folder @text --output @new",
        "@text --text @text --folder @new --output @text",
        "@text --text @text --folder @new --output @new --llama-python ?",
        "--shape ? --folder @new --output @new",
    ],
}
VERBS = [
    "export ./? --output @new",
    "export @checkpoint --output @new --quantize gptq --calibration ?",
    "export @checkpoint --output @new --device ?.toml",
    "generate ? Hello",
    "generate @bundle Hello --schema ?",
    "generate @bundle Hello --device ?.toml",
    "generate ? -",
    "chat ?",
    "chat @bundle --device ?.toml",
    "inspect ?",
    "verify ?",
    "verify @recorded --run --text ?",
    "verify @recorded --run --text @text --against ./?",
    "verify @recorded --run --device ?.toml",
    "evaluate ? --text @text",
    "evaluate @bundle --text ?",
    "evaluate @bundle --choices ?",
    "evaluate @bundle --text @text --against ./?",
    "evaluate @bundle --text @text --against @bundle --plot ?/x.png",
    "devices --profile ?.toml",
    "doctor ?",
    "doctor @bundle --device ?.toml",
    "demo --weights ?",
    "bench run ?",
    "bench run @bundle --workload ?",
    "bench run @bundle --device ?.toml",
    "bench run @bundle --output @text",
    "bench compare ? ?",
    "bench history ?",
    "ai-hub run ? --output @new --dry-run",
    "ai-hub wait ?",
]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths that are right, by their names above."""
    folder = tmp_path_factory.mktemp("paths")
    checkpoint = tiny_phi(folder / "checkpoint", PHI_3, ascii_text=True)
    edgephi.export(checkpoint, folder / "bundle", quantize="rtn", kv_cache="float")
    edgephi.export(checkpoint, folder / "recorded", quantize="rtn", kv_cache="float")
    text = folder / "text.txt"
    text.write_text("the quick brown fox " * 40, encoding="ascii")
    asked = ["evaluate", str(folder / "recorded"), "--text", str(text), "--windows", "1", "--window-length", "32"]
    done = CliRunner().invoke(app, [*asked, "--record"])
    assert done.exit_code == 0, done.exception
    (folder / "folder").mkdir()
    names = ("bundle", "recorded", "checkpoint", "folder", "new")
    return {name: str(folder / name) for name in names} | {"text": str(text), "python": sys.executable}


def filled(line: str, there: dict[str, str]) -> list[str]:
    words = [word.replace(MISSING, "not-there") for word in line.split()]
    return [there[word[1:]] if word.startswith("@") else word for word in words]


@pytest.mark.parametrize(("module", "line"), [(module, line) for module, lines in STUDIES.items() for line in lines])
def test_a_study_says_what_is_not_there(
    module: str,
    line: str,
    there: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    study = importlib.import_module(f"edgephi.benchmarks.{module}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", *filled(line, there)])
    started = time.perf_counter()
    with pytest.raises((SystemExit, EdgephiError)) as caught:
        study.main()
    assert time.perf_counter() - started < LONGEST_S
    said = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    words = ("there is no", "profile", "is no folder", "invalid choice", "is no published model", "is no bundle")
    assert any(word in said for word in words), said
    assert not list(tmp_path.iterdir()) and not Path(there["new"]).exists()


@pytest.mark.parametrize("line", VERBS)
def test_a_verb_says_what_is_not_there(
    line: str, there: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    before = sorted(Path(there["bundle"]).parent.rglob("*"))
    started = time.perf_counter()
    done = CliRunner().invoke(app, filled(line, there))
    assert time.perf_counter() - started < LONGEST_S
    assert isinstance(done.exception, EdgephiError), (done.exception, done.output)
    assert done.exception.remedy
    assert not done.stdout.strip(), "nothing is printed before the arguments are known to be right"
    assert sorted(Path(there["bundle"]).parent.rglob("*")) == before


def test_what_may_be_a_hub_id_is_not_looked_for_here() -> None:
    assert arguments.source("microsoft/Phi-4-mini-instruct") == "microsoft/Phi-4-mini-instruct"
    assert arguments.source("ollama:phi4-mini") == "ollama:phi4-mini"
