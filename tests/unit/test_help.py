"""What `edgephi --help` shows, and that every verb knows a model by its name."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgephi.commands.app import app
from edgephi.errors import ModelNotInstalledError, UsageError


def test_help_has_every_verb_in_one_line_under_a_heading() -> None:
    verbs = [one.name for one in app.registered_commands]
    verbs += [one.name for one in app.registered_groups if one.hidden is not True]
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    lines = shown.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("Get a model"))
    listed = [line.split()[0] for line in lines[first:] if line.startswith("  ") and not line.startswith("  Begin")]
    assert sorted(listed) == sorted(map(str, verbs)), "one line each, and none is cut"
    assert listed[:3] == ["demo", "run", "pull"] and "..." not in shown.split("Get a model")[1]
    assert "edgephi run demo" in lines[-1]


NEEDS_SERVER = pytest.mark.skipif(find_spec("starlette") is None, reason="the extra server is not installed")


@pytest.mark.parametrize(
    "verb",
    [
        "generate {} hello",
        "chat {}",
        "inspect {}",
        "verify {}",
        "evaluate {} --text x.txt",
        "package {} --output x",
        "doctor {}",
        "bench run {}",
        pytest.param("serve {}", marks=NEEDS_SERVER),
        pytest.param("serve other={}", marks=NEEDS_SERVER),
        "bench history {}",
        "adapter convert x --bundle {} --output x",
    ],
)
def test_every_verb_takes_a_name(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(app, verb.format("phi-4").split()).exception
    assert isinstance(error, ModelNotInstalledError) and "edgephi pull phi-4" in str(error), error


@pytest.mark.parametrize("verb", [["generate", "./none", "hello"], ["chat", "./none"]])
def test_sampling_is_looked_at_before_the_model_is_loaded(verb: list[str]) -> None:
    error = CliRunner().invoke(app, [*verb, "--top-p", "2"]).exception
    assert isinstance(error, UsageError) and "top_p is 2.0" in str(error), error
