"""A process that runs one mutated input after another: `python -m tests.fuzz.worker`.

A line of JSON in ({"kind", "seed"}); out come lines for every operation it starts ({"step"}), then {"result"}.
Importing and warming up cost more than a hundred inputs, so a worker lives until an input kills it. What libraries
print goes nowhere.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

DOCTOR_EVERY = 40
"""Bundles of which one is diagnosed as well: that starts processes, a second each."""


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "EDGEPHI_PREPACKED": "never", "HF_HUB_OFFLINE": "1"}
    from tests.fuzz.cases import make_case
    from tests.fuzz.targets import run

    def say(what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    def say_step(step: str) -> None:
        say({"step": step})

    home = Path.cwd()
    with TemporaryDirectory(prefix="edgephi-fuzz-") as folder:
        os.environ["EDGEPHI_CACHE"] = str(Path(folder) / "cache")
        for line in sys.stdin:
            asked = json.loads(line)
            place = Path(folder) / "case"
            place.mkdir()
            case = make_case(asked["kind"], asked["seed"])
            say_step("start")
            doctor = case.bundle and asked["seed"] % DOCTOR_EVERY == 0
            _reset_peak()
            started = time.perf_counter()
            result = run(case, place, doctor, say_step)
            seconds = time.perf_counter() - started
            os.chdir(home)
            _remove(place)
            answer = asdict(result) | {"seconds": seconds, "peak": _peak(), "notes": case.notes}
            say({"result": answer})


def _remove(place: Path) -> None:
    """Delete a folder, unreadable ones included."""

    def try_again(function: Callable[..., object], path: str, error: object) -> None:
        with suppress(OSError):
            os.chmod(path, stat.S_IRWXU)  # noqa: PTH101
            function(path)

    shutil.rmtree(place, onerror=try_again)


def _reset_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """Most bytes this process had in memory since the last reset; None where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    main()
