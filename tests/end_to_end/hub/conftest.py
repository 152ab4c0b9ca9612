"""A farm, its server, a bundle, and the command in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgephi.commands.app import main
from tests.npu_bundle import make_npu_bundle

if TYPE_CHECKING:
    # the server speaks with qai-hub's messages; where that is not installed, the tests skip before they ask for it
    from tests.end_to_end.hub.commands import Result
    from tests.end_to_end.hub.server import Farm


@pytest.fixture
def farm() -> Farm:
    from tests.end_to_end.hub.server import Farm

    return Farm()


@pytest.fixture
def port(farm: Farm) -> Iterator[int]:
    from tests.end_to_end.hub.server import serving

    with serving(farm) as server:
        yield server.server_address[1]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "phi-x-elite"
    folder.mkdir()
    make_npu_bundle(folder)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The whole command, in this process: importing qai-hub takes longer than what most tests ask of it."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["edgephi", "ai-hub", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def hub(
    in_process: Callable[..., Result], tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """The same, with a server to talk to."""
    from tests.end_to_end.hub.commands import environment

    for name, value in environment(tmp_path, port).items():
        monkeypatch.setenv(name, value)
    return in_process
