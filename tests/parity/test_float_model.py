"""The float model, streamed a layer at a time, equals transformers; and nothing of it stays on disk."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from edgephi.errors import OutputError, UsageError
from edgephi.export.calibrate import float_model
from edgephi.export.calibrate.float_model import float_logits
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from tests.decoding import distance

TOLERANCE = 1e-4  # of a logit's spread
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CASES = sorted(folder.name for folder in FIXTURES.iterdir() if (folder / "reference.npz").is_file())


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go in these tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_streamed_logits_equal_the_reference(case: str, fixtures: Path, scratch: Path) -> None:
    reference = np.load(fixtures / case / "reference.npz")
    ids, expected = reference["input_ids"][0], reference["logits"]
    architecture, steps = describe(open_folder(fixtures / case)), []
    with float_logits(architecture, [ids], lambda: steps.append(None)) as model:
        rows = [model.logits(0, start, min(start + 10, len(ids))) for start in range(0, len(ids), 10)]
    assert distance(np.concatenate(rows)[None], expected) < TOLERANCE
    assert len(steps) == architecture.spec.layers
    assert list(scratch.iterdir()) == []


def test_sequences_do_not_see_each_other_and_may_differ_in_length(fixtures: Path) -> None:
    """The last one alone is beyond the length at which this model changes its rope."""
    reference = np.load(fixtures / "phi3-longrope-long" / "reference.npz")
    short = np.load(fixtures / "phi3-longrope-short" / "reference.npz")  # the same weights
    sequences = [short["input_ids"][0], short["input_ids"][0, :9], reference["input_ids"][0]]
    with float_logits(describe(open_folder(fixtures / "phi3-longrope-long")), sequences) as model:
        found = [model.logits(index, 0, len(ids))[None] for index, ids in enumerate(sequences)]
    for logits, expected in zip(found, (short["logits"], short["logits"][:, :9], reference["logits"]), strict=True):
        assert distance(logits, expected) < TOLERANCE


@pytest.mark.parametrize("ids", [[], [3, 10**6], [-1], [5] * 200])
def test_sequences_the_model_cannot_read_are_refused(ids: list[int], fixtures: Path) -> None:
    architecture = describe(open_folder(fixtures / "llama-tied"))
    with pytest.raises(UsageError), float_logits(architecture, [np.array(ids, np.int64)]):
        pass


def test_a_full_disk_is_told_before_any_work(fixtures: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_model, "RESERVE", 2**60)
    with (
        pytest.raises(OutputError, match="TMPDIR"),
        float_logits(describe(open_folder(fixtures / "llama-tied")), [np.array([3, 4])]),
    ):
        pass
    assert list(scratch.iterdir()) == []


def test_the_model_is_never_in_memory(smollm2_gguf: Path) -> None:
    """Of SmolLM2's 538 MB in float32, the head is 113 MB and a layer 14 MB; hidden states are 2 MB here."""
    program = f"""
import gguf, numpy as np, onnx_ir, onnxruntime
from edgephi.devices.memory import peak_resident_bytes
from edgephi.export.families import describe
from edgephi.export.calibrate.float_model import float_logits
from edgephi.export.checkpoint.source import open_source
architecture, before = describe(open_source({str(smollm2_gguf)!r})), peak_resident_bytes()
with float_logits(architecture, [np.arange(10, 522)] * 2) as model:
    layers = peak_resident_bytes()
    model.logits(1, 0, 128)
print(4 * architecture.parameters, layers - before, peak_resident_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    whole, layers, everything = map(int, done.stdout.split())
    assert layers < 0.4 * whole
    assert everything < 0.75 * whole
