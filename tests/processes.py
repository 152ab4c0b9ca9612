"""Processes that write their id to a file, how far they are, and whether they are still there."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def pid_in(file: Path) -> int:
    """Of the child, once it runs."""
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(file.read_text())


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Until an export has come as far as the test wants to disturb it."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, "the export ended before it could be disturbed"
        time.sleep(0.005)


def gone_within(pid: int, seconds: float) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        try:
            psutil.Process(pid).wait(seconds)
        except psutil.TimeoutExpired:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def children_that_run(module: str) -> list[psutil.Process]:
    """Children of this process that run a module; other tests may have left children of Python's own."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if module in child.cmdline():
                found.append(child)
    return found
