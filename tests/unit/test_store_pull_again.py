"""Where an installed model has no graph for a device, the error names the `edgephi pull` that gets one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import edgephi
from edgephi.commands.app import main
from edgephi.errors import NoGraphError
from edgephi.store.library import PullRecord, write_record
from edgephi.store.pull_again import name_pull
from tests.unit.test_bundle import make_bundle

EXPORT = "Export it again"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


def install(home: Path, name: str, record: PullRecord | None) -> Path:
    """A bundle with a graph for the CPU alone."""
    folder = home / "models" / name
    folder.parent.mkdir(parents=True)
    make_bundle(folder)
    (home / "state").mkdir()
    if record is not None:
        write_record(name, record)
    return folder


def remedy(folder: Path, device: str = "gpu") -> str:
    return name_pull(NoGraphError("no graph", where=folder, remedy=EXPORT, device=device)).remedy


@pytest.mark.parametrize(
    ("name", "record", "device", "command"),
    [
        ("demo", PullRecord(source="demo"), "gpu", "edgephi pull demo --device gpu --force"),
        (
            "phi-4-mini",
            PullRecord(source="microsoft/Phi-4-mini-instruct", revision="1" * 40),
            "webgpu-gpu",
            "edgephi pull phi-4-mini --device webgpu-gpu --force",
        ),
        (
            "mine",
            PullRecord(source="org/model", asked="v2", quantize="gptq"),
            "gpu",
            "edgephi pull org/model --name mine --device gpu --force --revision v2 --quantize gptq",
        ),
        ("model", PullRecord(source="org/model"), "gpu", "edgephi pull org/model --device gpu --force"),
        # the NPU's bundle runs nowhere else, so it gets a name of its own
        ("demo", PullRecord(source="demo"), "npu", "edgephi pull demo --name demo-npu --device npu"),
        (
            "demo",
            PullRecord(source="demo"),
            "snapdragon-x-elite",
            "edgephi pull demo --name demo-npu --device snapdragon-x-elite",
        ),
    ],
)
def test_a_pulled_model_is_pulled_again(home: Path, name: str, record: PullRecord, device: str, command: str) -> None:
    assert remedy(install(home, name, record), device) == f"Install it with one: `{command}`"


def test_of_what_was_not_pulled_nobody_knows_the_source(home: Path, tmp_path: Path) -> None:
    assert remedy(install(home, "mine", None)) == EXPORT
    make_bundle(tmp_path / "mine")
    write_record("mine", PullRecord(source="org/mine"))
    assert remedy(tmp_path / "mine") == EXPORT


def test_a_graph_that_could_not_be_made_is_not_asked_for_again(home: Path) -> None:
    folder = install(home, "mine", PullRecord(source="org/mine", notes=("no graph for a GPU: a reason",)))
    assert remedy(folder) == EXPORT


@pytest.mark.parametrize("verb", ["generate demo Hello", "bench run demo", "package demo --output out", "doctor demo"])
def test_commands_say_so(
    verb: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install(home, "demo", PullRecord(source="demo"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["edgephi", *verb.split(), "--device", "gpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = " ".join("".join(capsys.readouterr()).split())
    assert ended.value.code == 1
    assert "the bundle has no graph for" in said and "`edgephi pull demo --device gpu --force`" in said, said


def test_load_says_so(home: Path) -> None:
    folder = install(home, "demo", PullRecord(source="demo"))
    for model in ("demo", folder):
        with pytest.raises(NoGraphError, match=r"`edgephi pull demo --device gpu --force`"):
            edgephi.load(model, device="gpu")
