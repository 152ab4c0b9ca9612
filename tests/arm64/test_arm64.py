"""The same work on this processor and on an emulated Arm64, and what may differ.

    python tools/arm64.py FOLDER
    EDGEPHI_ARM64_PYTHON=FOLDER/python pytest tests/arm64

The emulated processor has the instructions of a Snapdragon X (no SVE, no SME). References: this processor's results,
and transformers' logits in tests/fixtures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.arm64.work import PARITY
from tests.fuzz.inputs import GGUF_FILE, gguf_file
from tests.quantized import rms_distance
from tests.tiny_phi import PHI_3, PHI_4_MINI, tiny_phi

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("EDGEPHI_ARM64_PYTHON")
INT4_LIMIT = 0.15
"""Of a logit's spread, between processors, at accuracy level 4: activations are rounded to 8 bits, and one that lies
between two steps may go the other way."""
FLOAT_LIMIT = 1e-4
SAME_KERNELS = 1e-4
"""Of a spread, rms: both processors' own kernels round the same blocks."""
BUNDLES = ("phi3", "phi4", "Q4_0")

pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="no emulated Arm64: run `python tools/arm64.py DIR` and set EDGEPHI_ARM64_PYTHON=DIR/python"
)


@dataclass(frozen=True)
class Results:
    """What one processor wrote."""

    folder: Path

    @property
    def found(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.folder / "found.json").read_text(encoding="utf-8"))
        return read

    def logits(self, name: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = np.load(self.folder / f"{name}.npy")
        return values


@pytest.fixture(scope="module")
def both(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """This processor's results, and Arm's."""
    assert PYTHON is not None
    folder = tmp_path_factory.mktemp("arm64")
    sources = folder / "sources"
    for name, shape in (("phi3", PHI_3), ("phi4", PHI_4_MINI)):
        tiny_phi(sources / name, shape, 320)
    (sources / "Q4_0.gguf").write_bytes(gguf_file(2)[GGUF_FILE])  # type: ignore[arg-type]  # a file
    profile = files("edgephi.devices").joinpath("profiles/cpu-arm-neon.toml").read_text(encoding="utf-8")
    (sources / "fast.toml").write_text(profile.replace('kleidiai = "exact"', 'kleidiai = "any"'), encoding="utf-8")
    here, arm = Results(folder / "here"), Results(folder / "arm")
    environment = os.environ | {"EDGEPHI_ARM64_PATH": str(PROJECT), "PYTHONUTF8": "1"}
    for python, results, others in ((sys.executable, here, ()), (PYTHON, arm, (here,))):
        results.folder.mkdir()
        folders = (sources, fixtures, results.folder, *(one.folder for one in others))
        subprocess.run(
            [python, "-m", "tests.arm64.work", *folders], env=environment, cwd=PROJECT, check=True, timeout=500
        )
    return here, arm


def test_the_processor_is_named(both: tuple[Results, Results]) -> None:
    assert both[1].found["processor"] == "Qualcomm Oryon"


@pytest.mark.parametrize("name", BUNDLES)
def test_an_export_without_calibration_has_the_same_bytes(name: str, both: tuple[Results, Results]) -> None:
    here, arm = (one.found["hashes"][name] for one in both)
    assert {"model.onnx", "model.onnx.data", "model_rows.onnx", "tokenizer.json"} <= here.keys()
    assert arm == here


@pytest.mark.parametrize("case", PARITY)
def test_float_logits_equal_transformers(case: str, fixtures: Path, both: tuple[Results, Results]) -> None:
    reference = np.load(fixtures / case / "reference.npz")["logits"]
    for logits in (both[1].logits(case), both[1].logits(f"{case}-steps")):
        assert np.abs(logits - reference).max() < FLOAT_LIMIT * reference.std(axis=-1).mean()


@pytest.mark.parametrize("name", BUNDLES)
def test_int4_logits_of_one_bundle_are_close(name: str, both: tuple[Results, Results]) -> None:
    here, arm = (one.logits(name) for one in both)
    assert np.abs(arm - here).max() < INT4_LIMIT * here.std(axis=-1).mean()


def test_kleidiai_is_off_where_it_would_round_more_coarsely(both: tuple[Results, Results]) -> None:
    here, arm = (one.found["kleidiai"] for one in both)
    assert here == dict.fromkeys(BUNDLES)
    assert {name: decided["on"] for name, decided in arm.items()} == {"phi3": True, "phi4": True, "Q4_0": False}


def test_without_kleidiai_blocks_without_zero_points_compute_as_here(both: tuple[Results, Results]) -> None:
    here, arm = both
    reference = here.logits("Q4_0")
    exact, genai, fast = (rms_distance(arm.logits(name), reference) for name in ("Q4_0", "genai", "fast"))
    assert max(exact, genai) < SAME_KERNELS
    assert fast > 0.01, "KleidiAI rounds as others do now: devices/kleidiai.py has lost its subject"
