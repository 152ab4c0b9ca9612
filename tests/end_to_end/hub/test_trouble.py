"""edgephi ai-hub in trouble: each problem is a sentence, and nothing that was submitted is lost or sent twice."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qai_hub", reason="qai-hub is not installed (extra: hub)")

from qai_hub.util import session

from edgephi.devices.ai_hub.fleet import prepare
from edgephi.devices.ai_hub.matrix import read_matrix
from edgephi.devices.ai_hub.state import read_state
from edgephi.errors import HubUnreachableError
from tests.end_to_end.hub.commands import (
    ELITE,
    Result,
    command,
    environment,
    last_line,
    write_matrix,
    write_profile_matrix,
)
from tests.end_to_end.hub.server import Farm, serving, stop
from tests.end_to_end.test_command import refused

Hub = Callable[..., Result]


def test_a_failed_job_gives_the_hubs_reason_and_the_others_their_results(
    hub: Hub, farm: Farm, bundle: Path, tmp_path: Path
) -> None:
    farm.fails["npu/prefill"] = "The device ran out of memory\nwhile loading."
    run = ("run", write_matrix(tmp_path, f'devices = ["{ELITE}"]'), "--output", tmp_path / "report", "--poll", 0.05)
    done = hub(*run, "--json")
    assert done.returncode == 1
    assert last_line(done).startswith("error: 1 of 2 jobs failed")
    assert "The device ran out of memory while loading" in last_line(done)
    prefill, decode = json.loads(done.stdout)["records"]
    assert prefill["status"] == "failed" and prefill["reason"] == "The device ran out of memory while loading"
    assert decode["status"] == "done"
    assert hub(*run).returncode == 1 and len(farm.jobs) == 2, "a failed job is not submitted again unasked"
    farm.fails.clear()
    again = hub(*run, "--retry-failed", "--json")
    assert again.returncode == 0, again.stderr
    assert len(farm.jobs) == 3
    assert [record["status"] for record in json.loads(again.stdout)["records"]] == ["done", "done"]


def test_what_needs_a_failed_job_is_skipped(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    farm.fails["npu/decode compile"] = "Unsupported operator"
    matrix = write_matrix(tmp_path, f'devices = ["{ELITE}"]', 'jobs = ["compile", "profile"]')
    done = hub("run", matrix, "--output", tmp_path / "report", "--poll", 0.05, "--json")
    assert done.returncode == 1 and "Unsupported operator" in last_line(done)
    assert [(r["kind"], r["graph"], r["status"]) for r in json.loads(done.stdout)["records"]] == [
        ("compile", "npu/prefill", "done"),
        ("compile", "npu/decode", "failed"),
        ("profile", "npu/prefill", "done"),
        ("profile", "npu/decode", "skipped"),
    ]


def test_waiting_too_long_is_a_sentence_and_can_go_on(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    farm.looks_until_done = 10**6
    matrix = write_matrix(tmp_path, f'devices = ["{ELITE}"]', "timeout_minutes = 0.01")
    late = hub("run", matrix, "--output", tmp_path / "report", "--poll", 0.1)
    assert late.returncode == 1 and "2 jobs still run after 0.01 minutes" in last_line(late)
    farm.looks_until_done = 0
    done = hub("wait", tmp_path / "report", "--poll", 0.05, "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)["records"]) == 2


def test_a_device_that_is_not_there_brings_its_neighbours(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    wrong = hub("submit", bundle, "--device", "snapdragon x elite", "--output", tmp_path / "report")
    refused(wrong, "the hub has no device 'snapdragon x elite'", f"Did you mean {ELITE}", status=2)
    assert not farm.models and not farm.jobs


def test_no_token_is_a_sentence(tmp_path: Path, bundle: Path) -> None:
    nothing = os.environ | {"QAIHUB_CLIENT_INI": str(tmp_path / "none.ini")}
    done = subprocess.run(command("devices"), env=nothing, capture_output=True, text=True)
    refused(done, "there is no token for Qualcomm AI Hub", "none.ini", "qai-hub configure")


def test_a_wrong_token_is_a_sentence_without_the_token(tmp_path: Path, port: int) -> None:
    wrong = environment(tmp_path, port, token="not-the-token")
    done = subprocess.run(command("devices"), env=wrong, capture_output=True, text=True)
    refused(done, "the hub does not accept the token")
    assert "not-the-token" not in done.stdout + done.stderr


def test_an_ini_without_a_token_does_not_show_what_it_holds(tmp_path: Path) -> None:
    ini = tmp_path / "client.ini"
    ini.write_text("api_token = secret-secret\n")
    done = subprocess.run(
        command("devices"), env=os.environ | {"QAIHUB_CLIENT_INI": str(ini)}, capture_output=True, text=True
    )
    refused(done, "configuration cannot be used")
    assert "secret" not in done.stderr


def test_a_server_that_is_not_there_is_a_sentence_within_seconds(tmp_path: Path, farm: Farm) -> None:
    with serving(farm) as server:
        closed = server.server_address[1]
    started = time.monotonic()
    done = subprocess.run(command("devices"), env=environment(tmp_path, closed), capture_output=True, text=True)
    refused(done, "the hub does not answer", f"http://127.0.0.1:{closed}", "picked up")
    assert time.monotonic() - started < 20, "qai-hub alone would wait 46 s"


def test_a_server_in_trouble_is_a_sentence(hub: Hub, farm: Farm) -> None:
    farm.status = 503
    refused(hub("devices"), "the hub could not list its devices", "unavailable")
    farm.status = 429
    refused(hub("devices"), "the hub")


def test_a_short_outage_while_waiting_is_ridden_out(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    """It begins after the first round; qai-hub itself asks three times."""
    trouble, farm.looks_until_done = [503] * 4, 6

    def stumble(request: str) -> None:
        farm.status = trouble.pop() if trouble and "/jobs/j1/" in request and farm.looks.get("j3") else 200

    farm.on_request = stumble
    done = hub("run", write_profile_matrix(tmp_path), "--output", tmp_path / "report", "--poll", 0.05)
    assert done.returncode == 0, done.stderr
    assert not trouble and len(farm.jobs) == 4


def test_a_server_that_dies_while_waiting_is_given_up_in_the_end(
    farm: Farm, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm.looks_until_done = 10**6
    with serving(farm) as server:
        for name, value in environment(tmp_path, server.server_address[1]).items():
            monkeypatch.setenv(name, value)
        fleet = prepare(read_matrix(write_profile_matrix(tmp_path)), tmp_path, tmp_path / "report", retry_failed=False)
        farm.on_request = lambda request: farm.looks.get("j3", 0) > 1 and (server.socket.close(), stop(server))
        started = time.monotonic()
        with pytest.raises(HubUnreachableError, match="does not answer"):
            fleet.wait(timeout_s=600, poll_s=0.05, submit=True)
        assert time.monotonic() - started < 30
    assert {step.status for step in read_state(fleet.path).steps.values()} == {"submitted"}


@pytest.mark.parametrize(
    "moment",
    [
        "POST /api/v1/models/m1/multipart_upload/",
        "POST /api/v1/jobs/",
        "GET /api/v1/jobs/j1/",
    ],
)
def test_a_server_that_dies_in_the_middle_is_survived(
    moment: str, farm: Farm, in_process: Hub, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the upload, at a submission, while waiting: the next run has nothing to submit twice."""
    monkeypatch.setattr(session, "BACKOFF_FACTOR", 0.01)  # how long it takes to give up has its own test
    run = ("run", write_profile_matrix(tmp_path), "--output", tmp_path / "report", "--poll", 0.05)
    with serving(farm) as server:
        port = server.server_address[1]

        def die(request: str) -> None:
            if request == moment:
                server.socket.close()
                stop(server)
                raise ConnectionAbortedError

        farm.on_request = die
        for name, value in environment(tmp_path, port).items():
            monkeypatch.setenv(name, value)
        died = in_process(*run)
    assert died.returncode == 1 and "the hub does not answer" in last_line(died), died.stderr
    farm.on_request = lambda request: None
    with serving(farm, port):
        done = in_process(*run, "--json")
    assert done.returncode == 0, done.stderr
    assert len(farm.jobs) == len(set(farm.submitted())) == 4
    assert [record["status"] for record in json.loads(done.stdout)["records"]] == ["done"] * 4


def test_a_run_that_is_killed_before_it_hears_the_answer_finds_its_job_again(
    farm: Farm, port: int, bundle: Path, tmp_path: Path
) -> None:
    """The worst moment: the hub has taken the second job, and nobody wrote down its id."""
    run = command("run", write_profile_matrix(tmp_path), "--output", tmp_path / "report", "--poll", 0.05)
    process: list[subprocess.Popen[Any]] = []
    killed = threading.Event()

    class Jobs(dict[str, Any]):
        def __setitem__(self, key: str, job: Any) -> None:
            super().__setitem__(key, job)
            if len(self) == 2 and not killed.is_set():
                killed.set()
                process[0].kill()
                process[0].wait()

    farm.jobs = Jobs()
    process.append(subprocess.Popen(run, env=environment(tmp_path, port), stderr=subprocess.DEVNULL))
    assert process[0].wait(timeout=60) != 0 and killed.is_set()
    state = json.loads((tmp_path / "report" / "state.json").read_text())
    assert [step["status"] for step in state["steps"].values()] == ["submitted", "submitting", "planned", "planned"]
    done = subprocess.run([*run, "--json"], env=environment(tmp_path, port), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(farm.submitted()) == len(set(farm.submitted())) == 4, "no job was submitted twice"
    assert {record["job_id"] for record in json.loads(done.stdout)["records"]} == set(farm.jobs)


def test_a_state_of_another_server_is_not_asked_here(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    state = Path(hub("submit", bundle, "--device", ELITE, "--output", tmp_path / "report").stdout.strip())
    record = json.loads(state.read_text())
    state.write_text(json.dumps(record | {"server": "https://elsewhere.example"}))
    asked = len(farm.requests)
    refused(hub("wait", state), "was submitted to https://elsewhere.example")
    assert len(farm.requests) == asked
