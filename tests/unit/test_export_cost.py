"""Measuring an export from outside: known loads give known numbers, and both exporters get the same weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from edgephi.benchmarks.checkpoint_folder import write_checkpoint_folder
from edgephi.benchmarks.child_cost import ChildCost, run_and_measure
from edgephi.benchmarks.studies.export_cost import Contender, Result, compare, contenders, table
from edgephi.errors import EdgephiError
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.checkpoint.tensors import read_rows
from edgephi.export.families import describe

MB = 10**6
HOLD = "import sys, time; held = bytearray({size}); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.2)"


def measured(code: str, folder: Path) -> ChildCost:
    return run_and_measure([sys.executable, "-c", code], folder=folder, environment=os.environ)


def test_memory_a_command_holds_is_its_peak(tmp_path: Path) -> None:
    empty = measured("import time; time.sleep(0.2)", tmp_path)
    full = measured(HOLD.format(size=100 * MB), tmp_path)
    assert 95 * MB < full.peak_bytes - empty.peak_bytes < 110 * MB
    if sys.platform == "linux":
        assert full.peak_private_bytes is not None and empty.peak_private_bytes is not None
        assert 95 * MB < full.peak_private_bytes - empty.peak_private_bytes < 110 * MB


def test_memory_of_processes_the_command_starts_counts_too(tmp_path: Path) -> None:
    child = HOLD.format(size=60 * MB)
    code = f"import subprocess, sys\n{HOLD.format(size=50 * MB)}\nsubprocess.run([sys.executable, '-c', {child!r}])"
    assert measured(code, tmp_path).peak_bytes > 110 * MB


def test_time_is_the_command_s_own(tmp_path: Path) -> None:
    idle = measured("import time; time.sleep(0.5)", tmp_path)
    busy = measured("import time\nwhile time.process_time() < 0.5: pass", tmp_path)
    assert 0.5 < idle.seconds < 2
    if sys.platform != "win32":
        assert idle.cpu_seconds is not None and busy.cpu_seconds is not None
        assert idle.cpu_seconds < 0.4 < busy.cpu_seconds < 2


def test_a_command_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(EdgephiError, match=r"status 3.*no such weights"):
        measured("print('no such weights'); raise SystemExit(3)", tmp_path)


def test_commands_take_turns_and_warm_up_runs_do_not_count(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    code = (
        "import sys, pathlib; name, out = sys.argv[1], pathlib.Path(sys.argv[2]); out.mkdir()\n"
        "(out / 'model.onnx').write_bytes(b'x' * 7)\n"
        f"pathlib.Path({str(journal)!r}).open('a').write(name)"
    )
    commands = [Contender(name, (sys.executable, "-c", code, name)) for name in "AB"]
    results = compare(commands, tmp_path, rounds=2, warm_up=1)
    assert journal.read_text() == "ABABAB"
    assert [(result.name, len(result.runs), result.output_bytes) for result in results] == [("A", 2, 7), ("B", 2, 7)]
    assert list(tmp_path.iterdir()) == [journal]


def test_ratios_are_of_medians() -> None:
    def result(name: str, *seconds: float, peak: int) -> Result:
        return Result(name, tuple(ChildCost(s, s, peak, None) for s in seconds), 1)

    rows = table([result("ours", 1, 2, 60, peak=100 * MB), result("theirs", 7, 9, 8, peak=450 * MB)]).splitlines()
    assert "2.0 s (1.0–60.0)" in rows[2]
    assert [cell.strip() for cell in rows[2].split("|")][-3:-1] == ["4.0", "4.5"]


def test_every_command_reads_the_same_weights() -> None:
    commands = contenders(Path("m.gguf"), Path("folder"), Path("python"), ["block_size=32"])
    assert [contender.name for contender in commands] == ["edgephi, GGUF", "edgephi, folder", "builder, folder"]
    assert "m.gguf" in commands[0].command
    assert all(Path(word) != Path("m.gguf") for word in commands[1].command + commands[2].command)
    assert "folder" in commands[1].command and "folder" in commands[2].command


def test_the_folder_holds_the_weights_of_the_gguf_file(smollm2_gguf: Path, tmp_path: Path) -> None:
    write_checkpoint_folder(smollm2_gguf, tmp_path / "folder")
    ours, folder = describe(open_gguf(smollm2_gguf)), describe(open_folder(tmp_path / "folder"))
    assert ours.spec == folder.spec
    stored = safetensors.numpy.load_file(tmp_path / "folder" / "model.safetensors")
    tensors = open_gguf(smollm2_gguf).tensors
    assert stored.keys() == tensors.keys()
    for name, ref in tensors.items():
        assert stored[name].dtype == np.float16
        np.testing.assert_array_equal(stored[name], read_rows(ref, 0, ref.shape[0]).astype(np.float16))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
