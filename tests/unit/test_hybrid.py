"""Fast cores of processors with two or three kinds, from what the systems would say; run on none of them."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from edgephi.devices import cpu, hybrid
from tests.unit.test_devices_cpu import HYPERTHREADED, machine

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")
ALDER_LAKE = {number: f"{number // 2 * 2}-{number // 2 * 2 + 1}" for number in range(12)} | {
    number: str(number) for number in range(12, 20)
}
"""Six fast cores of two threads, eight slow ones of one."""
ARM = {number: str(number) for number in range(8)}


def with_capacity(root: Path, capacities: Mapping[int, int]) -> Path:
    for number, capacity in capacities.items():
        (root / f"sys/devices/system/cpu/cpu{number}/cpu_capacity").write_text(f"{capacity}\n")
    return root


def with_intel(root: Path, cpus: str) -> Path:
    (root / "sys/devices/cpu_core").mkdir()
    (root / "sys/devices/cpu_core/cpus").write_text(cpus + "\n")
    return root


@LINUX
@pytest.mark.parametrize(
    ("allowed", "cores"), [(range(20), 6), (range(10, 20), 1), ({0, 1, 2, 12}, 2), (range(12, 20), None)], ids=str
)
def test_intel_lists_its_fast_cpus(tmp_path: Path, allowed: set[int], cores: int | None) -> None:
    root = with_intel(machine(tmp_path, ALDER_LAKE), "0-11")
    assert hybrid.fast_cores(frozenset(allowed), root) == cores


@LINUX
@pytest.mark.parametrize(
    ("capacities", "cores"),
    [
        ([1024] * 8, None),
        ([325] * 4 + [1024] * 4, 4),
        ([325] * 4 + [870] * 3 + [1024], 4),
        ([1024, 1009, 1024, 1009, 676, 676, 676, 676], 4),
    ],
)
def test_capacities_tell_fast_from_slow(tmp_path: Path, capacities: list[int], cores: int | None) -> None:
    root = with_capacity(machine(tmp_path, ARM), dict(enumerate(capacities)))
    assert hybrid.fast_cores(range(8), root) == cores


@LINUX
def test_a_system_that_says_nothing_of_kinds(tmp_path: Path) -> None:
    assert hybrid.fast_cores(range(8), machine(tmp_path, HYPERTHREADED)) is None


@LINUX
@pytest.mark.parametrize("cpus", ["", "a-b", "3-"])
def test_a_list_that_is_none(tmp_path: Path, cpus: str) -> None:
    assert hybrid.fast_cores(range(20), with_intel(machine(tmp_path, ALDER_LAKE), cpus)) is None


@LINUX
@pytest.mark.parametrize(
    ("allowed", "threads"),
    [(range(20), 6), (range(8), 4), (range(12, 20), 8), ({0, 1, 12, 13}, 3), ({0, 1, 2, 3, *range(12, 20)}, 10)],
    ids=str,
)
def test_decoding_gets_a_thread_for_each_fast_core_if_these_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], threads: int
) -> None:
    monkeypatch.setattr(cpu, "allowed_cpus", lambda: frozenset(allowed))
    assert cpu.decode_threads(with_intel(machine(tmp_path, ALDER_LAKE), "0-11")) == threads


def core(kind: int, mask: int, group: int = 0, relationship: int = 0) -> bytes:
    """A PROCESSOR_RELATIONSHIP with one GROUP_AFFINITY, as winnt.h has it."""
    body = struct.pack("<BB20sHQH3H", mask.bit_count() > 1, kind, b"", 1, mask, group, 0, 0, 0)
    return struct.pack("<II", relationship, 8 + len(body)) + body


FAST = b"".join(core(1, 0b11 << 2 * number) for number in range(6))
SLOW = b"".join(core(0, 1 << 12 + number) for number in range(8))


@pytest.mark.parametrize(
    ("information", "allowed", "cores"),
    [
        (FAST + SLOW, range(20), 6),
        (FAST + SLOW, {0, 1, 12}, 1),
        (FAST + SLOW, range(12, 20), None),
        (SLOW, range(20), None),
        (core(0, 1) + core(1, 1, group=1) + core(2, 0b10, group=1), range(128), 1),
        (core(9, 1, relationship=3) + SLOW, range(20), None),
        (b"", range(4), None),
        (FAST + SLOW[:-1], range(20), None),
        (FAST + bytes(8) + SLOW, range(20), None),
    ],
    ids=["all", "some", "none fast", "alike", "groups", "other facts", "nothing", "cut off", "no size"],
)
def test_windows_says_the_class_of_each_core(information: bytes, allowed: set[int], cores: int | None) -> None:
    assert hybrid.fast_cores_of(information, allowed) == cores


@pytest.mark.parametrize(
    ("said", "cores"),
    [({"hw.nperflevels": "2", "hw.perflevel0.physicalcpu": "8"}, 8), ({"hw.nperflevels": "1"}, None), ({}, None)],
)
def test_macos_counts_them(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], cores: int | None) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("edgephi.devices.cpu_features.sysctl", lambda key: said.get(key, ""))
    assert hybrid.fast_cores(range(10)) == cores


@LINUX
def test_a_list_without_end_takes_no_memory(tmp_path: Path) -> None:
    root = with_intel(machine(tmp_path, ALDER_LAKE), f"0-11,100-{2**40}")
    assert hybrid.fast_cores(range(20), root) == 6


@LINUX
def test_siblings_that_are_no_text(tmp_path: Path) -> None:
    root = with_intel(machine(tmp_path, ALDER_LAKE), "0-11")
    (root / "sys/devices/system/cpu/cpu3/topology/thread_siblings_list").write_bytes(b"\xff\xfe")
    assert hybrid.fast_cores(range(20), root) is None
