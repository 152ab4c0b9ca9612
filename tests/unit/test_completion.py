"""The command completes verbs, options and names of models, by the protocol that shells speak with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_bundle import make_bundle


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "models").mkdir(parents=True)
    make_bundle(tmp_path / "home" / "models" / "my-phi")
    return tmp_path / "home"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgephi", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def completed(line: str) -> list[str]:
    """What bash is offered for a line; what follows the last space is incomplete."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_EDGEPHI_COMPLETE": "complete_bash"}
    done = run(**asked)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash_is_offered_verbs_options_and_names(home: Path) -> None:
    assert completed("edgephi pu") == ["pull"]
    assert completed("edgephi chat my") == ["my-phi"]
    assert completed("edgephi pull phi-4-mini-") == ["phi-4-mini-reasoning"]
    assert "--device" in completed("edgephi generate my-phi hello --de")
    assert completed("edgephi rm ") == ["my-phi"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bashs_own_completion_calls_it(home: Path, tmp_path: Path) -> None:
    """The script as bash reads it, up to the words that Tab would offer."""
    command = tmp_path / "bin" / "edgephi"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgephi "$@"\n')
    command.chmod(0o755)
    program = (
        'eval "$(edgephi completion bash)"\nCOMP_WORDS=(edgephi generate my)\nCOMP_CWORD=2\n'
        '_edgephi_completion edgephi my generate\necho "${COMPREPLY[@]}"\ncomplete -p edgephi'
    )
    environment = os.environ | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.splitlines()[0] == "my-phi", done.stderr
    assert "-F _edgephi_completion edgephi" in done.stdout


@pytest.mark.parametrize(
    ("shell", "mark"),
    [("zsh", "#compdef edgephi"), ("fish", "complete --command edgephi"), ("powershell", "Register-")],
)
def test_the_other_shells_have_a_script(shell: str, mark: str) -> None:
    assert mark in run("completion", shell).stdout
