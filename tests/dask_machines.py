"""A Dask scheduler and workers as processes of their own, as on several machines."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil


class Machines:
    """Started on demand; all end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address, self.host = folder, "", "127.0.0.1"
        self.namespaces: dict[str, str] = {}
        """Network namespaces of processes, by their names."""
        self._stack = ExitStack()

    def scheduler(self) -> subprocess.Popen[bytes]:
        """A scheduler, at the address of the one before if there was one."""
        port = self.address.rpartition(":")[2] or "0"
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        words = ["--host", self.host, "--port", port, "--no-dashboard", "--scheduler-file", str(file)]
        process = self._start("distributed.cli.dask_scheduler", words, "scheduler")
        wait_for(lambda: file.is_file() and file.stat().st_size > 0, process)
        if not self.address:
            self.address = json.loads(file.read_text())["address"]
        return process

    def worker(self, name: str, resources: str, address: str | None = None) -> subprocess.Popen[bytes]:
        words = [
            address or self.address,
            "--name",
            name,
            "--resources",
            resources,
            "--nthreads",
            "1",
            "--memory-limit",
            "0",
        ]
        words += ["--no-nanny", "--no-dashboard", "--local-directory", str(self.folder / "dask")]
        return self._start("distributed.cli.dask_worker", words, name)

    def _start(self, module: str, words: list[str], log: str) -> subprocess.Popen[bytes]:
        file = self._stack.enter_context((self.folder / f"{log}.log").open("ab"))
        command = self.within(log, [sys.executable, "-m", module, *words])
        process = subprocess.Popen(command, stdout=file, stderr=file)
        self._stack.callback(_end, process)
        return process

    def within(self, name: str, command: list[str]) -> list[str]:
        """The command, in the namespace of this name if there is one."""
        return ["ip", "netns", "exec", self.namespaces[name], *command] if name in self.namespaces else command

    def close(self) -> None:
        self._stack.close()


@contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    found = Machines(folder)
    try:
        yield found
    finally:
        found.close()


def measuring(worker: subprocess.Popen[bytes], function: str = "lab.execute:measure") -> list[psutil.Process]:
    """Processes in which the worker calls a function, by default a lab's."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(worker.pid).children():
            with suppress(psutil.Error):
                if any(function in word for word in child.cmdline()):
                    found.append(child)
    return found


def wait_for(reached: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until a function says so, at most so long, and only while the process lives."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, "the process ended"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
