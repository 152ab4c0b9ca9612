"""`edgephi bench lab.toml --scheduler` with real Dask workers, some of which are lost."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgephi.benchmarks.cluster import client
from edgephi.errors import ClusterError, UsageError
from tests.dask_machines import Machines, machines, measuring, wait_for
from tests.end_to_end.test_bench import bundle, command
from tests.end_to_end.test_bench_lab import WORKLOAD

pytest.importorskip("distributed", reason="Dask is not installed (extra: cluster)")

__all__ = ["bundle"]

WORDS = ("salty", "deep", "blue")


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    with machines(tmp_path) as found:
        yield found


def write_lab(folder: Path, bundles: list[Path], workloads: int, devices: str) -> Path:
    for word in WORDS[:workloads]:
        (folder / f"{word}.toml").write_text(WORKLOAD.replace("salty", word))
    lab = folder / "lab.toml"
    lab.write_text(
        f"bundles = {json.dumps(list(map(str, bundles)))}\n"
        f"workloads = {json.dumps([f'{word}.toml' for word in WORDS[:workloads]])}\n{devices}\n"
    )
    return lab


def start(lab: Path, address: str, *within: str) -> subprocess.Popen[bytes]:
    words = [*within, sys.executable, "-m", "edgephi", "bench", str(lab), "--scheduler", address, "--json"]
    with (lab.parent / "lab.out").open("wb") as out, (lab.parent / "lab.err").open("ab") as err:
        return subprocess.Popen(words, stdout=out, stderr=err, env=os.environ)


def cells(lab: Path) -> list[dict[str, Any]]:
    file = lab.parent / "lab-results" / "lab.json"
    found: list[dict[str, Any]] = json.loads(file.read_text())["cells"] if file.exists() else []
    return found


def said(lab: Path) -> str:
    return (lab.parent / "lab.err").read_text()


def assert_every_cell_is_there_once(lab: Path, count: int) -> None:
    assert [one["state"] for one in cells(lab)] == ["done"] * count, said(lab)
    folder = lab.parent / "lab-results"
    assert sorted(path.name for path in (folder / "cells").iterdir()) == sorted(one["name"] for one in cells(lab))
    with (folder / "table.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    decoded = [row["label"] for row in rows if row["figure"] == "decode_tokens_per_s"]
    assert len(decoded) == len(set(decoded)) == count


def test_a_lost_workers_cell_is_measured_by_another(bundle: Path, several: Machines, tmp_path: Path) -> None:
    lab = write_lab(tmp_path, [bundle], 1, "devices = ['cpu']")
    several.scheduler()
    first = several.worker("first", "edgephi-cpu=1")
    running = start(lab, several.address)
    wait_for(lambda: measuring(first), running)
    several.worker("second", "edgephi-cpu=1")
    first.kill()
    assert running.wait(120) == 0, said(lab)
    assert_every_cell_is_there_once(lab, 1)
    assert "1 of 1  bundle, salty, cpu" in said(lab) and "2 of 1" not in said(lab)


def three_devices(folder: Path, bundle: Path) -> Path:
    """2 bundles × 3 workloads × 3 devices, each of a machine of its own."""
    other = Path(shutil.copytree(bundle, folder / "other"))
    devices = "".join(
        f"[[devices]]\nname = '{name}'\ndevice = 'cpu'\nresource = '{name}'\n" for name in ("desk", "board", "laptop")
    )
    return write_lab(folder, [bundle, other], 3, devices)


@pytest.mark.slow
def test_eighteen_cells_a_lost_worker_and_a_new_scheduler(bundle: Path, several: Machines, tmp_path: Path) -> None:
    lab = three_devices(tmp_path, bundle)
    scheduler = several.scheduler()
    workers = {name: several.worker(name, f"{name}=1") for name in ("desk", "board", "laptop")}

    running = start(lab, several.address)
    wait_for(lambda: measuring(workers["board"]), running)
    workers["board"].kill()
    wait_for(lambda: sum(one["state"] == "done" for one in cells(lab)) >= 4, running)
    scheduler.kill()
    assert running.wait(60) == 1
    assert "Traceback" not in said(lab) and "the scheduler went away" in said(lab) and "repeat the command" in said(lab)
    before = {one["name"] for one in cells(lab) if one["state"] == "done"}
    for name in ("desk", "laptop"):
        assert workers[name].wait(60) is not None, "a worker without a scheduler ends"
    assert 4 <= len(before) < 18
    assert not [one for one in cells(lab) if one["state"] == "failed"]

    several.scheduler()
    for name in ("desk", "laptop"):
        several.worker(name, f"{name}=1")
    running = start(lab, several.address)
    wait_for(lambda: "no worker has the resource board now" in said(lab), running)
    several.worker("board again", "board=1")
    assert running.wait(300) == 0, said(lab)
    assert f"{len(before)} of 18 cells were done before" in said(lab)
    assert_every_cell_is_there_once(lab, 18)
    assert "| board " in (tmp_path / "lab-results" / "table.md").read_text()


@pytest.fixture
def networks() -> Iterator[list[str]]:
    """Three network namespaces; the first reaches the others as 10.77.1.2 and 10.77.2.2, and is .1 to them."""
    names = [f"edgephi-{os.getpid()}-{number}" for number in range(3)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        for number in (1, 2):
            ends = ("-n", names[0], "link", "add", f"to{number}", "type", "veth")
            ip(*ends, "peer", "name", "home", "netns", names[number])
            for name, link, host in ((names[0], f"to{number}", 1), (names[number], "home", 2)):
                ip("-n", name, "addr", "add", f"10.77.{number}.{host}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.slow
def test_a_worker_that_is_cut_off_loses_its_cell_to_another(
    bundle: Path, several: Machines, networks: list[str], tmp_path: Path
) -> None:
    lab = write_lab(tmp_path, [bundle], 2, "devices = ['cpu']")
    several.host, several.namespaces = "0.0.0.0", dict(zip(("scheduler", "near", "far"), networks, strict=True))
    several.scheduler()
    port = several.address.rpartition(":")[2]
    near = several.worker("near", "edgephi-cpu=1", f"tcp://10.77.1.1:{port}")
    running = start(lab, f"tcp://127.0.0.1:{port}", *several.within("scheduler", []))
    wait_for(lambda: measuring(near), running)
    subprocess.run(["ip", "-n", networks[0], "link", "set", "to1", "down"], check=True)
    several.worker("far", "edgephi-cpu=1", f"tcp://10.77.2.1:{port}")
    assert running.wait(300) == 0, said(lab)
    assert_every_cell_is_there_once(lab, 2)
    assert near.wait(120) is not None, "a worker without a scheduler ends"


@pytest.mark.slow
def test_an_interrupted_lab_keeps_what_is_known_and_frees_the_worker(
    bundle: Path, several: Machines, tmp_path: Path
) -> None:
    lab = write_lab(tmp_path, [bundle], 1, "devices = ['cpu']\nrepetitions = 200")
    workload = tmp_path / "salty.toml"
    workload.write_text(workload.read_text().replace("others_cpu_limit = 1.0", "others_cpu_limit = 1.0\npause_s = 0.2"))
    several.scheduler()
    worker = several.worker("desk", "edgephi-cpu=1")
    running = start(lab, several.address)
    wait_for(lambda: list(tmp_path.glob("scratch/edgephi-lab-*/partial.json")), running)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert [one["state"] for one in cells(lab)] == ["partial"], said(lab)
    wait_for(lambda: not measuring(worker), worker, 10)


@pytest.mark.slow
def test_a_bundle_that_is_missing_or_another_is_refused_by_its_workers_name(
    bundle: Path, several: Machines, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    device = f"name = 'desk'\ndevice = 'cpu'\nresource = 'desk'\nbundles = {json.dumps(str(tmp_path / 'there'))}"
    lab = write_lab(tmp_path, [bundle], 1, f"[[devices]]\n{device}")
    with pytest.raises(UsageError, match="there is no scheduler"):
        command("bench", lab)
    several.scheduler()
    several.worker("the desk", "desk=1")
    command("bench", lab, "--scheduler", several.address, status=1)
    assert "worker the desk" in cells(lab)[0]["reason"] and "no such bundle" in cells(lab)[0]["reason"]

    copy = Path(shutil.copytree(bundle, tmp_path / "there" / bundle.name))
    damaged = next(path for path in copy.rglob("*.data") if path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    command("bench", lab, "--scheduler", several.address, status=1)
    assert damaged.name in cells(lab)[0]["reason"]

    manifest = json.loads((copy / "edgephi.json").read_text())
    manifest["files"][0]["sha256"] = "0" * 64
    (copy / "edgephi.json").write_text(json.dumps(manifest))
    command("bench", lab, "--scheduler", several.address, status=1)
    assert "another bundle than the one that was asked for" in cells(lab)[0]["reason"]

    shutil.rmtree(copy)
    shutil.copytree(bundle, copy)
    command("bench", lab, "--scheduler", several.address)
    assert_every_cell_is_there_once(lab, 1)


def test_no_scheduler_is_said_with_what_to_do(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CONNECT_S", 1)
    lab = write_lab(tmp_path, [bundle], 1, "scheduler = 'nothing://x'")
    with pytest.raises(UsageError, match="no address of a Dask scheduler"):
        command("bench", lab)
    with pytest.raises(UsageError, match="names no certificates"):
        command("bench", lab, "--scheduler", "tls://127.0.0.1:9")
    with pytest.raises(ClusterError, match="no Dask scheduler answers"):
        command("bench", lab, "--scheduler", "tcp://127.0.0.1:9")


def test_cells_that_no_worker_can_measure_wait_until_the_time_is_used_up(
    bundle: Path, several: Machines, tmp_path: Path
) -> None:
    lab = write_lab(tmp_path, [bundle], 1, "devices = ['cpu', 'npu']")
    several.scheduler()
    shown = command("bench", lab, "--scheduler", several.address, "--time-budget", "1s")
    assert [one["state"] for one in cells(lab)] == ["waiting", "waiting"]
    assert "no worker has the resource edgephi-cpu now; its cells wait for one" in shown.stderr
    assert "no worker has the resource edgephi-npu now" in shown.stderr
    assert "the time budget is used up; the same command goes on" in shown.stderr


@pytest.mark.parametrize("sent", [None, 7, ["reason"], "report"])
def test_what_is_no_answer_is_a_reason(monkeypatch: pytest.MonkeyPatch, sent: object) -> None:
    future = SimpleNamespace(
        status="finished", key="k", add_done_callback=lambda call: call(future), result=lambda **_: sent
    )
    desk = SimpleNamespace(
        submit=lambda *_, **__: future,
        scheduler_info=lambda **_: {"workers": {"w": {"resources": {"r": 1}}}},
        close=lambda **_: None,
        status="closed",
    )
    monkeypatch.setattr(client, "connect", lambda address: desk)
    monkeypatch.setattr(client.uuid, "uuid4", lambda: SimpleNamespace(hex=""))
    future.key = "edgephi-j-"
    cluster = client.Cluster("tcp://x:1", len, client.Words("cell", "cells", "Again"), print)
    ((job, answer),) = cluster.run([client.Job("j", "r")], lambda job: None, lambda job, budget: {})
    assert job.name == "j" and "sent no answer" in answer["reason"]


@pytest.mark.parametrize("address", ["nonsense", "tcp://", ""])
def test_an_address_without_a_port_is_refused_before_dask_waits(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("distributed.Client", None)
    lab = write_lab(tmp_path, [bundle], 1, "scheduler = 'tcp://127.0.0.1:9'")
    with pytest.raises(UsageError, match="missing port number"):
        command("bench", lab, "--scheduler", address)


def test_where_nothing_is_left_no_scheduler_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "connect", lambda address: pytest.fail("it was asked"))
    cluster = client.Cluster("tcp://127.0.0.1:9", len, client.Words("cell", "cells", "Again"), print)
    assert list(cluster.run([], lambda job: None, lambda job, budget: {})) == []
