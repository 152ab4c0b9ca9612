"""An export that was killed continues from its last whole layer and gives the bytes of an undisturbed run."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

import edgephi
from edgephi.errors import OutputError
from edgephi.export.journal import JOURNAL
from edgephi.export.options import Progress
from tests.processes import wait_until

# exports slowly enough to be killed in the middle: a pause after every slice of the weights
SLOW_EXPORT = """
import sys, time
import edgephi
edgephi.export(sys.argv[1], sys.argv[2], on_progress=lambda progress: time.sleep(0.02))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def done_layers(partial: Path) -> list[str]:
    journal = partial / JOURNAL
    return journal.read_text(encoding="utf-8").splitlines()[1:] if journal.is_file() else []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("layers_before_the_kill", [1, 9])
def test_killed_and_resumed_is_byte_identical(
    smollm2_gguf: Path, smollm2_bundle: Path, tmp_path: Path, layers_before_the_kill: int
) -> None:
    target, partial = tmp_path / "out", tmp_path / ".out.partial"
    process = subprocess.Popen([sys.executable, "-c", SLOW_EXPORT, str(smollm2_gguf), str(target)])
    wait_until(lambda: len(done_layers(partial)) >= layers_before_the_kill, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists(), "half a bundle must not look like a whole one"
    before = len(done_layers(partial))
    assert before >= layers_before_the_kill

    reports: list[Progress] = []
    edgephi.export(smollm2_gguf, target, on_progress=reports.append)
    assert reports[-1].done == reports[-1].total
    # what was done is reported at once, not done again; a layer of this file has 2.2 MB, the embedding 30
    jump = max(later.done - earlier.done for earlier, later in pairwise(reports))
    assert jump >= 2_000_000 * before
    assert contents(target) == contents(smollm2_bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to another process")
def test_ctrl_c_says_that_the_export_can_go_on(smollm2_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgephi", "export", str(smollm2_gguf), "--output", str(tmp_path / "out")]
    # a runner in the background may ignore SIGINT, and its children inherit that
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*command, "--quantize", "rtn"], stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    wait_until(lambda: bool(done_layers(tmp_path / ".out.partial")), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said == "interrupted; the same command goes on from the last whole layer\n"


def test_other_arguments_start_anew(smollm2_gguf: Path, smollm2_bundle: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"

    class Interrupted(BaseException):
        pass

    def interrupt(progress: Progress) -> None:
        if len(done_layers(partial)) >= 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        edgephi.export(smollm2_gguf, tmp_path / "out", block_size=64, quantize="rtn", on_progress=interrupt)
    assert done_layers(partial), "an interrupted export keeps what it has"
    edgephi.export(smollm2_gguf, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(smollm2_bundle)


def test_two_exports_to_one_output_do_not_mix(smollm2_gguf: Path, tmp_path: Path) -> None:
    lock = tmp_path / ".out.lock"
    code = "import sys, pathlib, edgephi.lock as l\nwith l.locked(pathlib.Path(sys.argv[1])): input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE)
    wait_until(lambda: lock.is_file() and bool(lock.read_text(encoding="ascii")), other)
    with pytest.raises(OutputError, match=f"process {other.pid}"):
        edgephi.export(smollm2_gguf, tmp_path / "out")
    other.kill()
    other.communicate()
    assert lock.is_file(), "a killed process leaves the file, and nobody holds the lock"
    edgephi.export(smollm2_gguf, tmp_path / "out", precision="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
