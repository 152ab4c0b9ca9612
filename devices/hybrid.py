"""How many fast cores a processor with two or three kinds of them has.

A product is cut into equal parts, one for each thread, and is done when the last part is. A slow core among fast ones
makes all of them wait, and decoding reads memory, which four fast cores or more keep busy by themselves. So the default
is then one thread for each fast core, as llama.cpp counts too. With fewer of them (laptops with two fast cores and
eight slow ones) all cores count. A prompt would gain from the slow cores in any case, but a session of onnxruntime has
one number of threads for both. This is reasoned and not measured: nothing here has run on such a processor, and the
tests have the systems' answers as files and bytes.

Sources: Linux, Documentation/ABI/testing/sysfs-devices-system-cpu (`cpu_capacity`) and the PMU of hybrid Intel
processors (`cpu_core`, tools/perf/Documentation/intel-hybrid.txt); Windows, winnt.h,
SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX; macOS, "Determining system capabilities" (`hw.perflevel0`).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Collection
from pathlib import Path

FAST_FROM = 3 / 4
"""Of the largest `cpu_capacity`: cores of one kind differ by some percent, Intel's small ones have two thirds, Arm's a
third or less."""
ENOUGH = 4
"""Fast cores from which on the slow ones are left out."""
PROCESSOR_CORE = 0
"""RelationProcessorCore."""
_HEAD = struct.Struct("<II")
_CORE = struct.Struct("<BB20xH")
"""Flags, EfficiencyClass, reserved, GroupCount; behind the head."""
_GROUP = struct.Struct("<QH6x")
"""GROUP_AFFINITY: mask, group, reserved."""
GROUP_SIZE = 64


def fast_cores(allowed: Collection[int], root: Path = Path("/")) -> int | None:
    """Physical cores of the fast kind behind a set of logical CPUs.

    Args:
        root: where Linux's /sys is found.

    Returns:
        None where all cores are alike, the system says nothing of kinds, or none of the set is fast.
    """
    if sys.platform == "win32":
        return fast_cores_of(_windows_cores(), allowed)
    if sys.platform == "darwin":
        from edgephi.devices.cpu_features import sysctl

        kinds, fast = sysctl("hw.nperflevels"), sysctl("hw.perflevel0.physicalcpu")
        return int(fast) if kinds.isdecimal() and int(kinds) > 1 and fast.isdecimal() else None
    topology = root / "sys/devices/system/cpu"
    fast_cpus = _linux_fast(allowed, topology, root / "sys/devices/cpu_core/cpus")
    if not fast_cpus or len(fast_cpus) == len(allowed):
        return None
    try:
        return len({(topology / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip() for cpu in fast_cpus})
    except (OSError, ValueError):
        return None


def fast_cores_of(information: bytes, allowed: Collection[int]) -> int | None:
    """The same from what GetLogicalProcessorInformationEx(RelationProcessorCore) wrote.

    Args:
        allowed: logical CPUs, counted through groups of 64.
    """
    cores: list[tuple[int, set[int]]] = []
    at = 0
    while at + _HEAD.size + _CORE.size <= len(information):
        relationship, size = _HEAD.unpack_from(information, at)
        if size < _HEAD.size + _CORE.size or at + size > len(information):
            return None
        if relationship == PROCESSOR_CORE:
            _, kind, groups = _CORE.unpack_from(information, at + _HEAD.size)
            cpus: set[int] = set()
            for index in range(groups):
                place = at + _HEAD.size + _CORE.size + index * _GROUP.size
                if place + _GROUP.size > at + size:
                    return None
                mask, group = _GROUP.unpack_from(information, place)
                cpus |= {group * GROUP_SIZE + bit for bit in range(GROUP_SIZE) if mask >> bit & 1}
            cores.append((kind, cpus))
        at += size
    kinds = {kind for kind, _ in cores}
    if len(kinds) < 2:
        return None
    fastest = max(kinds)  # a higher efficiency class is more performance and less efficiency
    return sum(kind == fastest and not cpus.isdisjoint(allowed) for kind, cpus in cores) or None


def _linux_fast(allowed: Collection[int], topology: Path, intel: Path) -> set[int]:
    try:
        return _listed(intel.read_text(), allowed)
    except (OSError, ValueError):  # no hybrid processor of Intel's
        pass
    try:
        capacity = {cpu: int((topology / f"cpu{cpu}/cpu_capacity").read_text()) for cpu in allowed}
    except (OSError, ValueError):
        return set()
    most = max(capacity.values(), default=0)
    return {cpu for cpu, value in capacity.items() if value >= FAST_FROM * most}


def _listed(text: str, allowed: Collection[int]) -> set[int]:
    """Which CPUs of a set are in a list like `0-3,8` (Documentation/admin-guide/cputopology.rst).

    Raises:
        ValueError: it is no such list.
    """
    found: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        start, stop = int(first), int(last if dash else first)
        found |= {cpu for cpu in allowed if start <= cpu <= stop}
    return found


def _windows_cores() -> bytes:
    """What Windows says of each core; empty where it refuses."""
    if sys.platform != "win32":
        return b""
    import ctypes
    from ctypes import wintypes

    ask = ctypes.windll.kernel32.GetLogicalProcessorInformationEx
    size = wintypes.DWORD(0)
    ask(PROCESSOR_CORE, None, ctypes.byref(size))  # says how much there is
    buffer = ctypes.create_string_buffer(size.value)
    return buffer.raw[: size.value] if ask(PROCESSOR_CORE, buffer, ctypes.byref(size)) else b""
