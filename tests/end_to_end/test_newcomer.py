"""A newcomer's path: a name, a conversation, what is installed, and gone again. The seconds are printed (`-s`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from edgephi.demo import GGUF


def test_run_list_chat_and_rm(smollm2_gguf: Path, tmp_path: Path) -> None:
    """The demo's weights are in the cache already: how long a download takes is the network's matter."""
    (tmp_path / "cache").mkdir()
    shutil.copyfile(smollm2_gguf, tmp_path / "cache" / GGUF)
    environment = os.environ | {"EDGEPHI_HOME": str(tmp_path / "home"), "EDGEPHI_CACHE": str(tmp_path / "cache")}
    seconds: dict[str, float] = {}

    def edgephi(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "edgephi", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment,
            timeout=240,
        )
        seconds[" ".join(arguments)] = time.perf_counter() - started
        return done

    question = "What is the capital of Japan?\n"
    ran = edgephi("run", "demo", stdin=question)
    assert ran.returncode == 0 and "Tokyo" in ran.stdout, ran.stderr
    assert "demo: " in ran.stderr.splitlines()[0], "what was installed, once"

    listed = edgephi("list")
    assert listed.returncode == 0 and listed.stdout.startswith("| Name ")
    assert "demo" in listed.stdout and "cpu" in listed.stdout
    (record,) = json.loads(edgephi("list", "--json").stdout)["models"]
    assert record["name"] == "demo" and record["devices"] == ["cpu"] and record["last_used"] and not record["problem"]
    assert Path(record["folder"]) == tmp_path / "home" / "models" / "demo"

    chatted = edgephi("chat", "demo", stdin=question)
    assert chatted.returncode == 0 and "Tokyo" in chatted.stdout, chatted.stderr
    assert edgephi("inspect", "demo").returncode == 0

    # the demo's own verb takes the same bundle
    assert json.loads(edgephi("demo", "--json", "--max-new-tokens", "4").stdout)["bundle"] == record["folder"]

    removed = edgephi("rm", "demo")
    assert removed.returncode == 0 and not (tmp_path / "home" / "models" / "demo").exists()
    assert json.loads(edgephi("list", "--json").stdout)["models"] == []
    gone = edgephi("chat", "demo", stdin=question)
    assert gone.returncode == 1 and "`edgephi pull demo`" in gone.stderr and gone.stderr.count("\n") == 1
    for verb, took in seconds.items():
        print(f"{took:6.1f} s  edgephi {verb}")
