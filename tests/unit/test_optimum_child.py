"""The process that traces for `--via optimum` ends with its caller, and every end of it is a sentence.

A module in torch's place, the first one imported there, does what torch might.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgephi.errors import UnsupportedModelError, WeightError
from edgephi.export.optimum.export import trace
from edgephi.export.optimum.trace import require_used_head
from tests.processes import gone_within, pid_in

CALLER = """
from pathlib import Path
from edgephi.export.optimum.export import trace
trace(Path("checkpoint"), Path("folder"))
"""

SLEEPING = """
import os, pathlib, time
path = pathlib.Path({file!r})
path.with_suffix(".new").write_text(str(os.getpid()))
path.with_suffix(".new").rename(path)
time.sleep(600)
"""


@pytest.fixture
def torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "torch.py"


def test_a_killed_export_takes_the_trace_with_it(torch: Path, tmp_path: Path) -> None:
    torch.write_text(SLEEPING.format(file=str(tmp_path / "pid")))
    caller = subprocess.Popen([sys.executable, "-c", CALLER])
    pid = pid_in(tmp_path / "pid")
    assert not gone_within(pid, 0.2)
    caller.kill()
    caller.wait()
    assert gone_within(pid, 10)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_trace_that_the_system_ends_asks_for_memory(torch: Path) -> None:
    torch.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(UnsupportedModelError, match=r"the process died: signal SIGKILL \(phi\)\. Free memory"):
        trace(Path("phi"), Path("folder"))


def test_what_a_library_raises_is_the_reason(torch: Path) -> None:
    torch.write_text("raise RuntimeError('no such\\noperator')\n")
    said = r"could not trace the model: RuntimeError: no such operator \(phi\)\. Use a checkpoint"
    with pytest.raises(UnsupportedModelError, match=said):
        trace(Path("phi"), Path("folder"))


def test_the_libraries_are_quiet_and_offline_before_they_are_imported(
    torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    torch.write_text("import os\nraise RuntimeError(os.environ['HF_HUB_OFFLINE'])\n")
    with pytest.raises(UnsupportedModelError, match="RuntimeError: 1 "):
        trace(Path("phi"), Path("folder"))


class Layer:
    """What transformers 4.57 has in place of a head that it tied to the embedding."""

    def __init__(self, values: np.ndarray) -> None:
        self.weight = self
        self.values = values

    def __getitem__(self, rows: slice) -> Layer:
        return Layer(self.values[rows])

    def detach(self) -> Layer:
        return self

    def float(self) -> Layer:
        return self

    def numpy(self) -> np.ndarray:
        return self.values


@pytest.mark.parametrize("own", [True, False])
def test_a_head_that_transformers_would_drop_is_refused(own: bool, fixtures: Path, tmp_path: Path) -> None:
    tensors = load_file(fixtures / "llama-tied" / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    head = table.copy()
    head[-1, -1] += own
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((fixtures / "llama-tied" / "config.json").read_bytes())
    tied = Layer(table)
    model = SimpleNamespace(
        get_output_embeddings=lambda: tied, get_input_embeddings=lambda: tied, named_modules=lambda: [("lm_head", tied)]
    )
    with pytest.raises(WeightError, match=r"lm_head\.weight differs") if own else nullcontext():
        require_used_head(model, tmp_path)
