"""`edgephi serve` as a process: how it starts, rests and ends, and the `curl` lines of its documentation."""

from __future__ import annotations

# ruff: noqa: E402 - what is not installed skips these tests before it is imported
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

for package in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)

import httpx
import psutil

from edgephi.installed import install_extra

PROJECT = Path(__file__).resolve().parents[2]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hm"}], "max_tokens": 3}
LONG = {**CHAT, "max_tokens": 2000, "temperature": 2, "seed": 1, "logit_bias": {"2": -100}, "stream": True}


@contextmanager
def started(*arguments: str, stderr: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL."""
    command = [sys.executable, "-m", "edgephi", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"(http://\S+)/v1 serves ", line)
            assert found, line
            yield process, found[1]
        finally:
            process.kill()


def refuses_connections(url: str) -> bool:
    """Whether a server that was told to end listens no more, in a minute at most."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/health", timeout=60)
        except httpx.ConnectError:
            return True
        except httpx.HTTPError:  # it was in the row of those that the system had connected
            pass
        time.sleep(0.02)
    return False


def seconds_of_work(process: psutil.Process) -> float:
    """Processor time that a process takes in the next two seconds."""
    before = process.cpu_times()
    time.sleep(2)
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system


def test_it_rests_quietly_and_gives_its_memory_back(hermes_bundle: Path) -> None:
    with (
        started(f"m={hermes_bundle}", "--idle", "1") as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        seen = psutil.Process(process.pid)
        before = seen.memory_info().rss
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        deadline = time.monotonic() + 60
        while client.get("/health").json()["models"]["m"] != "sleeping":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert seen.memory_info().rss - before < 50e6
        assert not seen.children(recursive=True), "its child processes rest too"
        # the state is told before the closed model's memory is given back, which is work
        assert any(seconds_of_work(seen) <= 0.02 for _ in range(3))
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_folder_that_vanishes_is_told_by_name(hermes_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(hermes_bundle, folder)
    with started(f"m={folder}") as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health").json()["models"] == {"m": "sleeping"}
        shutil.rmtree(folder)
        assert client.get("/health").json()["models"] == {"m": "missing"}
        gone = client.post("/v1/chat/completions", json=CHAT)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_sigterm_lets_answers_finish(hermes_bundle: Path) -> None:
    with started(f"m={hermes_bundle}", "--drain", "60") as (process, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as answered:
            lines = answered.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert refuses_connections(url)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0


def test_an_answer_that_takes_longer_than_the_end_may_is_told_so(hermes_bundle: Path) -> None:
    with started(f"m={hermes_bundle}", "--drain", "0.3") as (process, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as answered:
            lines = answered.iter_lines()
            next(lines)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        ended = rest[-1] == "data: [DONE]"  # a fast machine was done before
        assert ended or (rest[-2] == "event: error" and "the server ended before the answer did" in rest[-1])
        assert process.wait(60) == 0
        assert time.monotonic() - began < 30, "less than it waits by default"


def test_a_second_signal_ends_it_at_once(hermes_bundle: Path) -> None:
    with started(f"m={hermes_bundle}", "--drain", "60") as (process, url):
        heard = threading.Event()

        def listen() -> None:
            try:
                with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as answered:
                    for _ in answered.iter_lines():
                        heard.set()
            except httpx.HTTPError:
                pass

        thread = threading.Thread(target=listen)
        thread.start()
        assert heard.wait(30)
        process.send_signal(signal.SIGINT)
        assert refuses_connections(url), "two signals that come before the first is heard are one"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, "it lets the answer finish, which may take a minute"
        thread.join(60)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_a_full_disk_behind_its_messages_changes_nothing(hermes_bundle: Path) -> None:
    with (
        Path("/dev/full").open("w") as full,
        started(f"m={hermes_bundle}", f"none={PROJECT}", stderr=full.fileno()) as (_, url),
    ):
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
        refused = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "model": "none"}, timeout=60)
        assert refused.status_code == 503
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgephi", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))


def test_what_cannot_be_served_is_told(hermes_bundle: Path, tmp_path: Path) -> None:
    cases = {
        (f"{hermes_bundle}", "--host", "0.0.0.0"): "there is no API key",
        (f"{tmp_path}/none",): "there is no folder",
        (f"a={hermes_bundle}", f"a={hermes_bundle}"): "two models have one name",
        (
            f"{hermes_bundle}",
            "--host",
            "203.0.113.1",
            "--port",
            "0",
            "--api-keys",
            f"{tmp_path}/keys",
        ): "nothing can listen",
    }
    (tmp_path / "keys").write_text("a-key-of-22-characters\n")
    (tmp_path / "keys").chmod(0o600)
    for arguments, said in cases.items():
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert said in done.stderr


def test_without_the_extra_it_says_what_to_install(hermes_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['starlette'] = None\n")
    done = run(str(hermes_bundle), environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == f"error: the server needs the package starlette. Install it: {install_extra('server')}.\n"


def curls() -> list[str]:
    page = (PROJECT / "docs" / "server.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_lines_of_the_documentation_run(hermes_bundle: Path, tmp_path: Path) -> None:
    lines = curls()
    assert len(lines) >= 8
    answered: dict[str, str] = {}
    with started(f"phi4-mini={hermes_bundle}") as (_, url):
        for line in lines:
            words = shlex.split(line.replace("http://127.0.0.1:8080", url))
            if "RESPONSE_ID" in line:
                words = [word.replace("RESPONSE_ID", answered["id"]) for word in words]
            done = subprocess.run([*words, "--silent", "--show-error", "--fail-with-body", "--max-time", "60"],
                                  capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            if "/v1/responses" in line and "-d" in words:
                answered = json.loads(done.stdout)
