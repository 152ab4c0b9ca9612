"""Nothing goes to the network, and nothing into the home folder but edgephi's cache, however long a bundle stays."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgephi
from tests.tiny_phi import PHI_3, tiny_phi

SWITCH = "ORT_DISABLE_TELEMETRY"
SECONDS = 40
"""Telemetry is sent from about 10 s on."""

HOLD = """
import sys, time
import edgephi
from edgephi.child import call
with edgephi.load(sys.argv[1]) as model:
    print(model.generate("\\u4e03", max_new_tokens=4).result().text, flush=True)
    print(call("os:getenv", {"key": "ORT_DISABLE_TELEMETRY"}, timeout_s=60), flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, int, str]]:
    """A bundle was made and held in a home of its own: the home, the calls of the system, status and stdout."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed: apt-get install strace")
    folder = tmp_path_factory.mktemp("silence")
    tiny_phi(folder / "source", PHI_3)
    edgephi.export(folder / "source", folder / "bundle", quantize="rtn")
    home, calls = folder / "home", folder / "calls"
    home.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "EDGEPHI_", "ORT_"))
    }
    command = [strace, "-f", "-qq", "-e", "trace=%network", "-o", str(calls), sys.executable, "-c", HOLD]
    probe = subprocess.run([strace, "-qq", "-o", os.devnull, sys.executable, "-c", ""], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"strace may not trace here: {probe.stderr.strip()[:200]}")
    done = subprocess.run(
        [*command, str(folder / "bundle"), str(SECONDS)],
        env=environment | {"HOME": str(home), "USERPROFILE": str(home)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS + 120,
    )
    yield home, calls, done.returncode, done.stdout


def test_a_bundle_that_is_held_opens_no_socket(held: tuple[Path, Path, int, str]) -> None:
    _, calls, status, _ = held
    assert status == 0
    sockets = re.findall(r"^.*\b(?:AF_INET6?|sin6?_addr)\b.*$", calls.read_text(encoding="utf-8"), re.MULTILINE)
    assert sockets == []


def test_a_bundle_that_is_held_writes_into_its_own_cache_alone(held: tuple[Path, Path, int, str]) -> None:
    home, _, status, _ = held
    assert status == 0
    files = [path.relative_to(home).parts for path in home.rglob("*") if not path.is_dir()]
    assert all("edgephi" in parts[:3] for parts in files), files


def test_a_child_is_silent_too(held: tuple[Path, Path, int, str]) -> None:
    assert held[3].splitlines()[-1] == "1"


def variable_after(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != SWITCH}
    program = f"{code}\nimport os; print(os.environ.get({SWITCH!r}))"
    return subprocess.run(
        [sys.executable, "-c", program], env=kept | environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("module", ["edgephi", "edgephi.child", "edgephi.export.pipeline", "edgephi.commands.app"])
def test_whatever_is_imported_first_sets_the_switch(module: str) -> None:
    assert variable_after(f"import {module}") == "1"


def test_who_has_set_the_switch_keeps_his_choice() -> None:
    assert variable_after("import edgephi", **{SWITCH: "0"}) == "0"


def test_peers_in_environments_of_their_own_get_it() -> None:
    from edgephi.benchmarks.compare_runtimes.variants import Contender

    peer = Contender("a peer", "llama.cpp", None, Path("engine"), {}, Path("made"), "a note")
    assert peer.environment()[SWITCH] == os.environ[SWITCH]
