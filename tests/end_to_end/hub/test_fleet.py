"""edgephi ai-hub against a loopback server that speaks the hub's protocol, through the real qai-hub client.

A contract test and no more: it shows that the commands say to the hub what its client understands, and read what it
answers. No graph is run.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("qai_hub", reason="qai-hub is not installed (extra: hub)")

from edgephi.benchmarks.bench.report.headline import headlines
from edgephi.benchmarks.bench.report.league import league, read_reports
from edgephi.benchmarks.bench.report.page import page
from edgephi.benchmarks.bench.report.table import markdown
from tests.bench_reports import case
from tests.bench_reports import report as make_report
from tests.end_to_end.hub.commands import ELITE, Result, write_matrix, write_profile_matrix
from tests.end_to_end.hub.server import CHIPSETS, INFERENCE_US, PEAK_BYTES, Farm, inner
from tests.end_to_end.test_command import refused
from tests.npu_bundle import CONTEXT_BYTES, make_npu_bundle

Hub = Callable[..., Result]


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


def test_what_hosted_devices_measured_stands_in_the_league_table(hub: Hub, farm: Farm, tmp_path: Path) -> None:
    folder = tmp_path / "phi-x-elite"
    folder.mkdir()
    make_npu_bundle(folder, facts=True)
    done = hub("run", write_profile_matrix(tmp_path), "--output", tmp_path / "fleet", "--poll", 0.05)
    assert done.returncode == 0, done.stderr
    reports = tmp_path / "fleet" / "bench"
    assert "edgephi bench table" in done.stderr and len(list(reports.iterdir())) == len(CHIPSETS)
    (section,) = league(read_reports([reports]))
    assert section.title.startswith("hosted NPU graphs (")
    here = make_report(case("decode", "decode", {"decode_tokens_per_s": [10.0]}))
    assert len(league([*section.reports, ("here", here)])) == 2, "whole answers are never in one table with graphs"
    for name, report in section.reports:
        # the hub's repetitions are 2.4, 2.5 and 2.6 ms, and each graph loads in 0.3 s
        assert headlines(report) == pytest.approx({"decode": 1 / 0.0025, "prefill": 64 / 0.0025, "load": 0.6})
        assert name in CHIPSETS and report.hardware == f"{name} ({CHIPSETS[name]}), hosted"
        assert "on random values" in report.workload.description and "head, sampling" in report.workload.description
        assert report.versions["QAIRT"] == "2.40.0" and report.stopped is None
        assert {one.name: one.value for one in report.derived}["share of layers on the NPU"] == pytest.approx(2 / 3)
        assert "threads not stated" in markdown(report) and "other processes: not measured" in markdown(report)
        assert "Snapdragon" in page(report)
    assert hub("run", tmp_path / "matrix.toml", "--output", tmp_path / "fleet").returncode == 0
    assert len(list(reports.iterdir())) == len(CHIPSETS), "a repeated run replaces them"


def test_a_phase_with_a_graph_that_was_not_profiled_has_no_rate(hub: Hub, farm: Farm, tmp_path: Path) -> None:
    folder = tmp_path / "phi-x-elite"
    folder.mkdir()
    make_npu_bundle(folder, facts=True)
    sent = hub("submit", folder, "--device", ELITE, "--graph", "npu/prefill", "--output", tmp_path / "fleet")
    assert sent.returncode == 0, sent.stderr
    assert hub("wait", tmp_path / "fleet", "--poll", 0.05).returncode == 0
    ((_, report),) = read_reports([tmp_path / "fleet"])
    assert set(headlines(report)) == {"prefill"}
    assert report.stopped == "1 of 2 graphs have no profile"
    assert {case.group: case.reason for case in report.cases if case.reason} == {
        "load": "the hub has no warm load of one of its graphs",
        "decode": "1 of its 1 graphs have no profile",
    }


def test_submit_returns_and_wait_fetches(hub: Hub, farm: Farm, bundle: Path, tmp_path: Path) -> None:
    sent = hub("submit", bundle, "--device", ELITE, "--output", tmp_path / "report")
    assert sent.returncode == 0, sent.stderr
    assert len(farm.jobs) == 2 and not farm.looks
    state = Path(sent.stdout.strip())
    fetched = hub("wait", state, "--poll", 0.05, "--json")
    assert fetched.returncode == 0, fetched.stderr
    assert [record["status"] for record in json.loads(fetched.stdout)["records"]] == ["done", "done"]
    assert hub("wait", state.parent, "--json").returncode == 0, "what is fetched stays"


def test_the_schema_describes_the_report(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    schema = json.loads(hub("schema").stdout)
    assert set(schema["properties"]) == {
        *("format", "edgephi", "qai_hub", "server", "created", "pending", "bundles", "records")
    }
    assert CONTEXT_BYTES > 2 * 65536, "an upload has several parts"
