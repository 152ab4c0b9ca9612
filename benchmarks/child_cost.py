"""Time, processor time and memory of a command, measured from outside.

Memory, on Linux: every 10 ms the status of the command and of all its descendants is read from /proc. The peak is the
larger of two numbers: the highest VmHWM of a single process (the kernel's own high-water mark, so nothing between two
samples is missed) and the highest sum of VmRSS over the processes that lived at one moment. It counts pages of mapped
files that are in memory; `peak_private_bytes`, the highest sum of RssAnon, does not (sampled, there is no high-water
mark for it). Elsewhere psutil is asked: the highest sum of resident sizes. Fields: Linux man-pages, proc_pid_status(5).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgephi.errors import EdgephiError

INTERVAL_S = 0.01


@dataclass(frozen=True)
class ChildCost:
    """What one run of a command took, from its start to its exit, interpreter and imports included."""

    seconds: float
    cpu_seconds: float | None
    """User and system time of the command and its descendants; None where the system does not tell (Windows)."""
    peak_bytes: int
    peak_private_bytes: int | None
    """None outside Linux."""


@dataclass(frozen=True)
class _Memory:
    resident: int
    high_water: int
    private: int | None


def run_and_measure(command: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> ChildCost:
    """Run a command in a folder and wait for it. What it prints goes to `output.txt` there.

    Raises:
        EdgephiError: the command cannot be started, or ends with another status than 0; quotes its last lines.
    """
    peak, peak_private = 0, None
    log = folder / "output.txt"
    before = os.times()
    with log.open("wb") as output:
        started = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, cwd=folder, env=dict(environment), stdout=output, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise EdgephiError(
                f"the command cannot be started: {error.strerror}", where=command[0], remedy="Name a Python interpreter"
            ) from error
        try:
            while process.poll() is None:
                memory = [_linux(pid) for pid in _family(process.pid)] if sys.platform == "linux" else _psutil(process)
                peak = max(peak, sum(one.resident for one in memory), *(one.high_water for one in memory))
                private = [one.private for one in memory if one.private is not None]
                if private:
                    peak_private = max(peak_private or 0, sum(private))
                time.sleep(INTERVAL_S)
        finally:
            process.kill()
            process.wait()
        seconds = time.perf_counter() - started
    after = os.times()
    if process.returncode:
        tail = " / ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
        raise EdgephiError(
            f"the command ended with status {process.returncode}: {tail}",
            where=" ".join(command),
            remedy="Run it by hand and repair what it reports",
        )
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return ChildCost(seconds, None if sys.platform == "win32" else cpu, peak, peak_private)


def _family(pid: int) -> list[int]:
    """A process and all its living descendants; much cheaper than psutil's walk over every process."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # the thread has ended
                continue
    return found


def _linux(pid: int) -> _Memory:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # the process has ended
        return _Memory(0, 0, None)
    lines = (line.partition(":") for line in status.splitlines())
    size = {name: int(value.split()[0]) * 1024 for name, _, value in lines if name in ("VmHWM", "VmRSS", "RssAnon")}
    return _Memory(size.get("VmRSS", 0), size.get("VmHWM", 0), size.get("RssAnon"))


def _psutil(process: subprocess.Popen[bytes]) -> list[_Memory]:
    import psutil

    memory = []
    try:
        root = psutil.Process(process.pid)
        for one in (root, *root.children(recursive=True)):
            info = one.memory_info()
            memory.append(_Memory(info.rss, getattr(info, "peak_wset", info.rss), None))
    except psutil.Error:  # a process has ended
        return memory
    return memory
