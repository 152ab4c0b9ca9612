"""`tools/arm64.py` says why a machine cannot make the interpreter; that it makes one is shown by tests/arm64."""

from __future__ import annotations

import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "arm64.py"


@pytest.fixture
def debian(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The tool's functions, on a machine that seems to be right for them."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian"})
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return runpy.run_path(str(TOOL))


def no_file() -> dict[str, str]:
    raise FileNotFoundError


@pytest.mark.parametrize(
    ("place", "name", "value", "said"),
    [
        (sys, "platform", "win32", "this is win32"),
        (platform, "machine", lambda: "aarch64", "on aarch64"),
        (platform, "freedesktop_os_release", lambda: {"ID": "fedora"}, "this is fedora"),
        (platform, "freedesktop_os_release", no_file, "an unknown system"),
        (shutil, "which", lambda name: None, "apt-get is not installed"),
    ],
    ids=["Windows", "Arm", "Fedora", "unknown", "no apt"],
)
def test_another_machine_is_told_what_is_missing(
    debian: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: Any,
    name: str,
    value: object,
    said: str,
) -> None:
    monkeypatch.setattr(place, name, value)
    monkeypatch.setattr(sys, "argv", ["arm64.py", str(tmp_path / "made")])
    with pytest.raises(SystemExit) as ended:
        debian["main"]()
    assert ended.value.code == debian["CANNOT"] == 3
    message = capsys.readouterr().err
    assert message.startswith("no emulated Arm64 here: ") and said in message


def test_a_folder_that_cannot_be_made_is_said(
    debian: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(debian["fetch_system"].__globals__, "debian_sources", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["arm64.py", str(tmp_path / "file" / "made")])
    with pytest.raises(SystemExit) as ended:
        debian["main"]()
    assert ended.value.code == 1 and "cannot be made: " in capsys.readouterr().err


def test_a_mirror_that_does_not_answer_ends_it_with_apts_words(
    debian: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = tmp_path / "debian.sources"
    sources.write_text("")
    failed = subprocess.CompletedProcess([], 100, "", "E: Could not\n resolve the mirror\n")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: failed)
    with (
        pytest.raises(debian["CannotError"], match="apt-get update for arm64 failed: E: Could not resolve the mirror"),
        debian["fetched_packages"](tmp_path, "arm64", sources, ("python3",)),
    ):
        pass
