"""Threads for decoding: physical cores this process may use, on machines made of files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edgephi.devices import cpu


def machine(root: Path, siblings: dict[int, str]) -> Path:
    """A Linux machine: logical CPU → the threads of its core."""
    for number, text in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    return root


def cgroup(root: Path, membership: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


HYPERTHREADED = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}


@pytest.mark.parametrize(
    ("allowed", "cores"), [(range(8), 4), ({0, 4}, 1), ({0, 1}, 2), ({0, 1, 4}, 2), ({7}, 1)], ids=str
)
def test_threads_of_one_core_count_once(tmp_path: Path, allowed: set[int], cores: int) -> None:
    assert cpu.physical_cores(frozenset(allowed), machine(tmp_path, HYPERTHREADED)) == cores


@pytest.mark.parametrize(
    ("cores", "logical", "allowed", "expected"),
    [(8, 16, 16, 8), (8, 16, 4, 2), (8, 16, 3, 2), (12, 12, 12, 12), (8, 16, 1, 1), (None, 4, 3, 3)],
)
def test_elsewhere_the_ratio_of_the_machine_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int | None, logical: int, allowed: int, expected: int
) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: total if logical else cores)
    total = logical
    assert cpu.physical_cores(frozenset(range(allowed)), tmp_path) == expected


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/app\n", {"app/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/app/worker\n", {"app/cpu.max": "200000 100000", "app/worker/cpu.max": "max 100000"}, 2.0),
        ("0::/host/path/of/container\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (
            "4:cpu,cpuacct:/job\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpuset:/\n", {"cpuset/cpu.max": "100000 100000"}, None),
        ("0::/\n", {"cpu.max": "rubbish"}, None),
    ],
    ids=["none", "max", "own", "parent", "container", "v1", "v1 unlimited", "other controller", "rubbish"],
)
def test_the_tightest_cgroup_quota_is_found(
    tmp_path: Path, membership: str, files: dict[str, str], quota: float | None
) -> None:
    assert cpu.cgroup_quota(cgroup(tmp_path, membership, files)) == quota


def test_without_linux_files_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu.cgroup_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "threads"), [("max", 4), ("250000", 2), ("50000", 1), ("900000", 4)])
def test_the_quota_bounds_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, threads: int) -> None:
    monkeypatch.setattr(cpu, "allowed_cpus", lambda: frozenset(range(8)))
    root = cgroup(machine(tmp_path, HYPERTHREADED), "0::/\n", {"cpu.max": f"{quota} 100000"})
    assert cpu.decode_threads(root) == threads


@pytest.mark.skipif(sys.platform != "linux", reason="sets this process's affinity")
def test_affinity_is_respected_on_this_machine() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpu.decode_threads() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= cpu.decode_threads() <= len(before)
