"""How many threads decoding deserves on this CPU.

Decoding reads every weight once per token, so it is bound by memory bandwidth: one thread per physical core that this
process may use is the useful maximum. A second thread on the same core, or one the scheduler will not run, only waits.
Where there are fast and slow cores, the fast ones count if they are enough (`devices/hybrid.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

from edgephi.devices.hybrid import ENOUGH, fast_cores


def decode_threads(root: Path = Path("/")) -> int:
    """Physical cores this process may use, or the fast ones of them where those are enough; at least 1.

    CPU affinity and the cgroup's CPU quota are respected.

    Args:
        root: where Linux's /proc and /sys are found.
    """
    allowed = allowed_cpus()
    cores, fast = physical_cores(allowed, root), fast_cores(allowed, root)
    if fast is not None and fast >= ENOUGH:
        cores = fast
    quota = cgroup_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def allowed_cpus() -> frozenset[int]:
    """Logical CPUs the scheduler may put this process on."""
    import psutil

    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # Linux and Windows
        return frozenset(process.cpu_affinity())
    return frozenset(range(os.cpu_count() or 1))


def physical_cores(allowed: frozenset[int], root: Path = Path("/")) -> int:
    """Cores behind a set of logical CPUs; at least 1.

    Linux says which logical CPUs are threads of one core (Documentation/admin-guide/cputopology.rst). Elsewhere the
    machine's ratio of cores to logical CPUs is applied to the set, rounded up.
    """
    import psutil

    topology = root / "sys/devices/system/cpu"
    try:
        siblings = {(topology / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip() for cpu in allowed}
    except OSError:
        cores, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
        if not cores or not logical:
            return max(1, len(allowed))
        return int(max(1, min(cores, -(-len(allowed) * cores // logical))))
    return max(1, len(siblings))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time the tightest enclosing cgroup grants this process, or None without a limit.

    Sources: Documentation/admin-guide/cgroup-v2.rst (`cpu.max`) and scheduler/sched-bwc.rst (`cpu.cfs_quota_us`).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        v2 = controllers == ""
        if not v2 and "cpu" not in controllers.split(","):
            continue
        for name in ("", "unified") if v2 else (controllers, "cpu"):
            mount = root / "sys/fs/cgroup" / name
            group = mount / path.lstrip("/")
            # inside a container the path may name the host's hierarchy; the mount itself is then the group
            for folder in {mount, group, *group.parents}:
                if folder.is_relative_to(mount):
                    quotas += _quota_of(folder)
    return min(quotas, default=None)


def _quota_of(group: Path) -> list[float]:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = (group / "cpu.cfs_quota_us").read_text(), (group / "cpu.cfs_period_us").read_text()
        return [int(quota) / int(period)] if quota.strip() not in ("max", "-1") and int(period) > 0 else []
    except (OSError, ValueError):
        return []
