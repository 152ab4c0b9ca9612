"""Memory of this process, private and file-backed apart.

Mapped weights are file-backed: the system drops such pages when somebody needs them and reads them again. Private
memory is what the process really costs.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from edgephi.devices.memory import peak_resident_bytes


@dataclass(frozen=True)
class Held:
    """Bytes this process holds now."""

    private: int
    file_backed: int | None
    """None where the system does not tell (macOS)."""


def held(root: Path = Path("/")) -> Held:
    """Read the counters: Linux smaps_rollup, Windows private bytes and the rest of the working set.

    Args:
        root: where Linux's /proc is found.
    """
    if sys.platform == "linux":
        kilobytes = _fields(root / "proc/self/smaps_rollup", ("Rss:", "Anonymous:", "Swap:"))
        return Held((kilobytes["Anonymous:"] + kilobytes["Swap:"]) * 1024, _file_backed(kilobytes) * 1024)
    import psutil

    info = psutil.Process().memory_full_info()
    if sys.platform == "win32":
        return Held(int(info.private), max(0, int(info.rss) - int(info.uss)))
    return Held(int(info.uss), None)


def private_now(root: Path = Path("/")) -> int:
    """Private bytes, read cheaply enough to be done a hundred times a second."""
    if sys.platform == "linux":
        return _fields(root / "proc/self/status", ("RssAnon:",))["RssAnon:"] * 1024
    return held().private


class PeakOfPrivate:
    """Watches private memory from a thread, every 10 ms; use it where nothing is timed."""

    def __init__(self) -> None:
        self.peak = private_now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakOfPrivate:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, private_now())

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, private_now())


def peak_resident() -> int:
    """The most memory this process has held at once, file-backed pages included."""
    return peak_resident_bytes()


def _file_backed(kilobytes: dict[str, int]) -> int:
    return max(0, kilobytes["Rss:"] - kilobytes["Anonymous:"])


def _fields(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Kilobytes of the named lines; 0 for one that is not there."""
    found = dict.fromkeys(names, 0)
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        words = line.split()
        if words and words[0] in found:
            found[words[0]] = int(words[1])
    return found
