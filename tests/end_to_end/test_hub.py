"""edgephi hub against a loopback server that speaks the hub's protocol, through the real qai-hub client.

A contract test and no more: it shows that the commands say to the hub what its client understands, and read what it
answers. No graph is run.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("qai_hub", reason="qai-hub is not installed (extra: hub)")

from edgephi.commands.app import main
from edgephi.commands.hub.driving import prepare
from edgephi.devices.hub.matrix import read_matrix
from edgephi.devices.hub.state import read_state
from edgephi.errors import HubUnreachableError
from tests.end_to_end.test_command import Result, refused
from tests.hub_server import CHIPSETS, INFERENCE_US, PEAK_BYTES, TOKEN, Farm, inner, serving, stop
from tests.npu_bundle import CONTEXT_BYTES, make_npu_bundle

ELITE, ELITE2 = CHIPSETS
Hub = Callable[..., Result]


@pytest.fixture
def farm() -> Farm:
    return Farm()


@pytest.fixture
def port(farm: Farm) -> Iterator[int]:
    with serving(farm) as server:
        yield server.server_address[1]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "phi-x-elite"
    folder.mkdir()
    make_npu_bundle(folder)
    return folder


def environment(folder: Path, port: int, token: str = TOKEN) -> dict[str, str]:
    """Where the client finds the server and the token."""
    ini = folder / "client.ini"
    url = f"http://127.0.0.1:{port}"
    ini.write_text(f"[api]\napi_token = {token}\napi_url = {url}\nweb_url = {url}\nverbose = true\n")
    return os.environ | {"QAIHUB_CLIENT_INI": str(ini), "NO_PROXY": "127.0.0.1", "COLUMNS": "200"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edgephi", "hub", *map(str, arguments)]


@pytest.fixture
def hub(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hub:
    """The whole command, in this process: importing qai-hub takes longer than what most tests ask of it."""
    for name, value in environment(tmp_path, port).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["edgephi", "hub", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), shown.out, shown.err)

    return run


def write_matrix(folder: Path, *lines: str, bundle: str = 'folder = "phi-x-elite"') -> Path:
    """A matrix with these lines and one bundle."""
    path = folder / "matrix.toml"
    path.write_text("\n".join(["format = 1", *lines, "[[bundle]]", bundle]) + "\n")
    return path


def write_profile_matrix(folder: Path, *lines: str) -> Path:
    return write_matrix(folder, f'devices = ["{ELITE}", "{ELITE2}"]', *lines)


def last_line(result: Result) -> str:
    return result.stderr.strip().splitlines()[-1]


def test_devices_lists_what_the_hub_offers(hub: Hub) -> None:
    listed = hub("devices", "--json")
    assert listed.returncode == 0, listed.stderr
    devices = json.loads(listed.stdout)["devices"]
    assert {device["name"]: device["chipset"] for device in devices} == CHIPSETS
    shown = hub("devices").stdout
    assert ELITE in shown and CHIPSETS[ELITE] in shown


def test_a_fleet_run_measures_every_graph_on_every_device(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    matrix = write_profile_matrix(tmp_path, "[options]", 'profile = "--max_profiler_iterations 5"')
    done = hub("run", matrix, "--output", tmp_path / "report", "--poll", 0.05, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "report" / "fleet.json").read_text())
    assert report["pending"] == 0
    places = [(record["device"], record["graph"]) for record in report["records"]]
    assert places == [(device, graph) for device in CHIPSETS for graph in ("npu/prefill", "npu/decode")]
    for record in report["records"]:
        assert record["chipset"] == CHIPSETS[record["device"]]
        assert record["status"] == "done" and record["kind"] == "profile" and record["bundle"] == "phi-x-elite"
        measured = record["measured"]
        assert measured["inference_s"] == INFERENCE_US / 1e6
        assert measured["inference_times_s"] == [0.0024, 0.0025, 0.0026]
        assert (measured["first_load_s"], measured["warm_load_s"]) == (0.9, 0.3)
        assert measured["peak_memory"] == PEAK_BYTES
        assert measured["layers"] == {"npu": 2, "gpu": 0, "cpu": 1, "unknown": 0}
        assert measured["not_on_npu"] == {"Gather": 1}
        assert record["warnings"] == [
            "Thermal throttling was seen",
            "1 of 3 layers ran elsewhere than on the NPU: Gather",
        ]
        assert record["tools"] == {"QAIRT": "2.40.0"}
        assert record["url"].endswith(f"/jobs/{record['job_id']}/")
        sent = inner(farm.jobs[record["job_id"]])
        assert sent.device.name == record["device"] and sent.options == "--max_profiler_iterations 5"
        assert sent.is_profiling_on and not sent.dataset.dataset_id
        assert len(json.loads((tmp_path / "report" / record["profile"]).read_text())["execution_detail"]) == 3


def test_a_graph_is_uploaded_once_and_whole(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    done = hub("run", write_profile_matrix(tmp_path), "--output", tmp_path / "report", "--poll", 0.05)
    assert done.returncode == 0, done.stderr
    assert sorted(farm.names.values()) == ["phi-x-elite npu/decode", "phi-x-elite npu/prefill"]
    for identity, content in farm.models.items():
        phase = farm.names[identity].rpartition("/")[2]
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert sorted(archive.namelist()) == [f"{phase}.onnx/{phase}.onnx", f"{phase}.onnx/{phase}_qnn.bin"]
            for name in archive.namelist():
                assert archive.read(name) == (bundle / "npu" / name.partition("/")[2]).read_bytes()
    assert "to upload: phi-x-elite npu/prefill, 150 kB" in done.stderr, "sizes are said before anything is sent"


def test_dry_run_says_sizes_and_asks_nobody(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    dry = hub("run", write_profile_matrix(tmp_path), "--output", tmp_path / "report", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "2 of 2 graphs to upload (300 kB), 4 of 4 jobs to submit" in dry.stderr
    assert not farm.requests and not (tmp_path / "report").exists()


def test_the_second_run_submits_only_what_is_missing(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    one = write_matrix(tmp_path, f'devices = ["{ELITE}"]')
    assert hub("run", one, "--output", tmp_path / "report", "--poll", 0.05).returncode == 0
    before = farm.submitted()
    both = hub("run", write_profile_matrix(tmp_path), "--output", tmp_path / "report", "--poll", 0.05, "--json")
    assert both.returncode == 0, both.stderr
    assert farm.submitted()[: len(before)] == before and len(farm.submitted()) == 4
    assert len(farm.models) == 2
    assert len(json.loads(both.stdout)["records"]) == 4
    asked = len(farm.requests)
    assert hub("run", tmp_path / "matrix.toml", "--output", tmp_path / "report").returncode == 0
    assert not [request for request in farm.requests[asked:] if not request.endswith("/devices/")]


def test_a_changed_graph_is_measured_again(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    submit = ("submit", bundle, "--device", ELITE, "--graph", "npu/decode", "--output", tmp_path / "report")
    assert hub(*submit).returncode == 0
    other = tmp_path / "other" / bundle.name
    other.mkdir(parents=True)
    make_npu_bundle(other, seed=1)
    assert hub("submit", other, *submit[2:]).returncode == 0
    assert len(farm.models) == len(farm.jobs) == 2


def test_compile_link_and_profile_follow_each_other(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    options = ("[options]", 'profile = "--qnn_options context_enable_graphs={graph}"')
    matrix = write_matrix(tmp_path, f'devices = ["{ELITE}"]', 'jobs = ["compile", "link", "profile"]', *options)
    done = hub("run", matrix, "--output", tmp_path / "report", "--poll", 0.05, "--json")
    assert done.returncode == 0, done.stderr
    kinds = [job.WhichOneof("job") for job in farm.jobs.values()]
    assert kinds == ["compile_job", "compile_job", "link_job", "inference_job", "inference_job"]
    first, second, link, *profiles = (inner(job) for job in farm.jobs.values())
    assert [model.model_id for model in link.models.models] == [
        first.target_model.model_id,
        second.target_model.model_id,
    ]
    assert {profile.model.model_id for profile in profiles} == {link.target_model.model_id}
    assert [profile.options.split("=")[1] for profile in profiles] == ["npu/prefill", "npu/decode"]
    records = json.loads(done.stdout)["records"]
    assert [record["status"] for record in records] == ["done"] * 5
    assert [record["measured"] is None for record in records] == [True, True, True, False, False]


def test_inference_sends_inputs_and_keeps_outputs(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    hidden = np.random.default_rng(0).normal(size=(1, 1, 16)).astype(np.float32)
    past = np.ones((1, 32), np.float16)
    np.savez(tmp_path / "decode.npz", past=past, hidden=hidden)
    chosen = 'folder = "phi-x-elite"\ngraphs = ["npu/decode"]\ninputs = { "npu/decode" = "decode.npz" }'
    matrix = write_matrix(tmp_path, f'devices = ["{ELITE}"]', 'jobs = ["inference"]', bundle=chosen)
    done = hub("run", matrix, "--output", tmp_path / "report", "--poll", 0.05, "--json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["records"]
    with np.load(tmp_path / "report" / record["outputs"]) as outputs:
        np.testing.assert_allclose(outputs["sum_hidden"], hidden.sum().reshape(1, 1, 1), rtol=1e-5)
        assert outputs["sum_past"].item() == 32
    (job,) = farm.jobs.values()
    assert inner(job).dataset.dataset_id == "d0"


def test_inputs_that_do_not_fit_are_refused_before_anything_is_sent(
    hub: Hub, farm: Farm, bundle: Path, tmp_path: Path
) -> None:
    chosen = 'folder = "phi-x-elite"\ngraphs = ["npu/decode"]'
    matrix = write_matrix(tmp_path, f'devices = ["{ELITE}"]', 'jobs = ["inference"]', bundle=chosen)
    refused(hub("run", matrix, "--output", tmp_path / "r"), "inference of npu/decode has no inputs", status=2)
    np.savez(tmp_path / "decode.npz", hidden=np.zeros((1, 2, 16), np.float32), past=np.ones((1, 32), np.float16))
    chosen += '\ninputs = { "npu/decode" = "decode.npz" }'
    matrix = write_matrix(tmp_path, f'devices = ["{ELITE}"]', 'jobs = ["inference"]', bundle=chosen)
    refused(hub("run", matrix, "--output", tmp_path / "r"), "hidden is float32[1, 2, 16]", "[1, 1, 16]", status=2)
    assert not farm.requests


def test_submit_returns_and_wait_fetches(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    sent = hub("submit", bundle, "--device", ELITE, "--output", tmp_path / "report")
    assert sent.returncode == 0, sent.stderr
    assert len(farm.jobs) == 2 and not farm.looks
    state = Path(sent.stdout.strip())
    fetched = hub("wait", state, "--poll", 0.05, "--json")
    assert fetched.returncode == 0, fetched.stderr
    assert [record["status"] for record in json.loads(fetched.stdout)["records"]] == ["done", "done"]
    assert hub("wait", state.parent, "--json").returncode == 0, "what is fetched stays"


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
def test_a_server_that_dies_in_the_middle_is_survived(moment: str, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    """Killed at the upload, at a submission, while waiting: the next run has nothing to submit twice."""
    run = command("run", write_profile_matrix(tmp_path), "--output", tmp_path / "report", "--poll", 0.05)
    with serving(farm) as server:
        port = server.server_address[1]

        def die(request: str) -> None:
            if request == moment:
                server.socket.close()
                stop(server)
                raise ConnectionAbortedError

        farm.on_request = die
        died = subprocess.run(run, env=environment(tmp_path, port), capture_output=True, text=True)
    assert died.returncode == 1 and "the hub does not answer" in last_line(died), died.stderr
    farm.on_request = lambda request: None
    with serving(farm, port):
        done = subprocess.run([*run, "--json"], env=environment(tmp_path, port), capture_output=True, text=True)
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


def test_the_schema_describes_the_report(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    schema = json.loads(hub("schema").stdout)
    assert set(schema["properties"]) == {"format", "edgephi", "qai_hub", "server", "created", "pending", "records"}
    assert CONTEXT_BYTES > 2 * 65536, "an upload has several parts"
