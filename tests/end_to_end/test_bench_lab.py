"""`edgephi bench lab.toml` on a tiny bundle, with a process for each cell; killed midway, it goes on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgephi.benchmarks.bench.lab.plan import read_lab
from edgephi.benchmarks.bench.report.history import read_history
from edgephi.errors import BundleError
from tests.end_to_end.test_bench import bundle, command, history

__all__ = ["bundle", "history"]

WORKLOAD = """
description = "Tiny."

[method]
repetitions = 2
others_cpu_limit = 1.0

[[answer]]
name = "question"
category = "question"
instruction = "why is the sea salty"
max_new_tokens = 4
stop = false
"""


@pytest.fixture
def lab(bundle: Path, tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(WORKLOAD)
    (tmp_path / "again.toml").write_text(WORKLOAD.replace("salty", "deep"))
    (tmp_path / "lab.toml").write_text(
        f"bundles = [{json.dumps(str(bundle))}]\n"
        "workloads = ['tiny.toml', 'again.toml']\n"
        "devices = ['cpu', 'gpu']\n"
        "[[settings]]\nname = 'one thread'\nthreads = 1\n"
    )
    return tmp_path / "lab.toml"


def test_a_lab_that_is_killed_goes_on_with_the_cells_that_are_left(lab: Path) -> None:
    words = [sys.executable, "-m", "edgephi", "bench", str(lab)]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("3 of 4"):  # the first is done, the second is refused
            running.kill()
            break
    running.wait()
    output = lab.with_name("lab-results")
    states = {one["name"]: one["state"] for one in json.loads((output / "lab.json").read_text())["cells"]}
    _, cells = read_lab(lab)
    assert [states[cell.name] for cell in cells] == ["done", "failed", "waiting", "waiting"]

    done = command("bench", lab, "--json", status=1)
    found = json.loads(done.stdout)["cells"]
    assert "1 of 4 cells were done before" in done.stderr
    assert [one["state"] for one in found] == ["done", "failed", "done", "failed"]
    assert "only for cpu" in found[1]["reason"]
    assert [one.label for one in read_history(None, None).reports] == [
        "bundle, tiny, cpu, one thread",
        "bundle, again, cpu, one thread",
    ]
    with (output / "table.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["label"] for row in rows} == {"bundle, tiny, cpu, one thread", "bundle, again, cpu, one thread"}
    assert {row["threads"] for row in rows} == {"1"}
    table = command("bench", "table", output).stdout
    assert "tiny (best" in table and "again (best" in table, "a section for each workload"
    assert "done" in command("bench", "lab", lab, "--dry-run", status=1).stdout


def test_a_lab_names_installed_models(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPHI_HOME", str(tmp_path / "home"))
    shutil.copytree(bundle, tmp_path / "home" / "models" / "mine")
    (tmp_path / "lab.toml").write_text("bundles = ['Mine']\nworkloads = ['quick']")
    (only,) = json.loads(command("bench", tmp_path / "lab.toml", "--dry-run", "--json").stdout)["cells"]
    assert (only["bundle"], only["state"]) == ("mine", "waiting")
    (tmp_path / "lab.toml").write_text("bundles = ['nothing']\nworkloads = ['quick']")
    with pytest.raises(BundleError, match="no such bundle"):
        command("bench", tmp_path / "lab.toml", "--dry-run")
