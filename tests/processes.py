"""Processes that write their id to a file, and whether they are still there."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil


def pid_in(file: Path) -> int:
    """Of the child, once it runs."""
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(file.read_text())


def gone_within(pid: int, seconds: float) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        try:
            psutil.Process(pid).wait(seconds)
        except psutil.TimeoutExpired:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True
