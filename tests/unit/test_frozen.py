"""A frozen program becomes edgephi's child process when edgephi starts it, and for nobody else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgephi import frozen
from edgephi.frozen import FUNCTIONS, MARK, MODULES, VARIABLE

PROJECT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
sys.frozen, sys.executable = True, {executable!r}
import edgephi
edgephi.freeze_support()
print("the program itself", sys.argv[1:])
if sys.argv[1:] == ["ask"]:
    from edgephi.child import call
    from edgephi.templates.chat_template import ChatTemplate
    print(sorted(call("edgephi.devices.doctor:imported_versions", {{}}, timeout_s=120)))
    print(ChatTemplate("{{{{ messages[0].content }}}}", {{}}).render([{{"role": "user", "content": "rendered"}}]))
    print("mark in the environment:", {variable!r} in __import__("os").environ)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """What PyInstaller makes of a program, played by a script: it is its own `sys.executable`."""
    if sys.platform == "win32":
        pytest.skip("the script that plays the program is one of a POSIX shell")
    program = tmp_path / "program"
    script = PROGRAM.format(executable=str(program), variable=VARIABLE)
    (tmp_path / "program.py").write_text(script, encoding="utf-8")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/program.py" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, env=os.environ | environment, input="", timeout=120
    )


def test_its_children_are_itself(program: Path) -> None:
    done = run(program, "ask")
    assert done.stdout.splitlines() == [
        "the program itself ['ask']",
        "['onnxruntime', 'onnxruntime_genai']",
        "rendered",
        "mark in the environment: False",
    ], done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [MARK],
        [MARK, "edgephi.child"],
        [MARK, "edgephi.child", "os:system"],
        [MARK, "edgephi.child", "edgephi.devices.detect:probe", "more"],
        [MARK, "http.server"],
        [MARK, "edgephi.templates.jinja_child.answer", "1", "1"],
    ],
)
def test_nothing_else_is_started(program: Path, arguments: list[str]) -> None:
    done = run(program, *arguments, **{VARIABLE: "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "edgephi's own child processes" in done.stderr


def test_arguments_alone_start_no_child(program: Path) -> None:
    """They may be a stranger's: the name of a file, or a link that opens the program."""
    done = run(program, MARK, "edgephi.child", "edgephi.devices.doctor:imported_versions")
    assert (done.returncode, done.stdout) == (2, "")


def test_the_environment_alone_starts_no_child(program: Path) -> None:
    assert run(program, "open", MARK, **{VARIABLE: "1"}).stdout == f"the program itself ['open', '{MARK}']\n"


def test_an_ordinary_python_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", MARK, "edgephi.child", "os:system"])
    monkeypatch.setenv(VARIABLE, "1")
    frozen.freeze_support()
    assert frozen.child_command("edgephi.child", ["json:loads"])[0] == sys.executable
    assert not frozen.child_environment()


def test_the_list_of_children_is_whole() -> None:
    """Every module and function that edgephi starts in a child process; optimum's is in another Python."""
    functions, modules = set(), set()
    for folder in ("edgephi", "runtime", "devices", "export"):
        for file in (PROJECT / folder).rglob("*.py"):
            if file.name != "frozen.py" and "optimum" not in file.parts:
                text = file.read_text(encoding="utf-8")
                functions |= set(re.findall(r'"(edgephi(?:\.\w+)+:\w+)"', text))
                modules |= set(re.findall(r'(?:BoundedChild|child_command)\("(edgephi(?:\.\w+)+)"', text))
    assert functions == FUNCTIONS
    # what downloads belongs to an export, which a frozen program does not hold
    assert modules - {"edgephi.store.hub_child"} == set(MODULES)
