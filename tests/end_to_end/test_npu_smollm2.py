"""Real weights for the NPU: SmolLM2-135M, its graphs on the CPU, and compiled on the simulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import edgephi
from edgephi.benchmarks.studies.npu_quality import QUESTION, answer, measure
from edgephi.benchmarks.studies.npu_stages import UncompiledStages
from edgephi.benchmarks.studies.quality import tokenize
from edgephi.bundle import NpuNumerics
from edgephi.export.npu.pipeline import export_for_npu
from edgephi.export.options import ExportOptions
from edgephi.export.plan import make_plan
from edgephi.export.weights.recipe import make_recipe
from edgephi.runtime.loading import load
from tests.npu_reference import X_ELITE

WINDOW = 256


NUMERICS = pytest.mark.parametrize("numerics", get_args(NpuNumerics))


@pytest.mark.slow
@NUMERICS
def test_fitted_graphs_stay_close_to_the_float_model_and_know_paris(
    smollm2_gguf: Path, shared_data: Path, tmp_path: Path, numerics: NpuNumerics
) -> None:
    """A few windows; benchmarks/studies/npu_quality.py measures more of them."""
    edgephi.export(smollm2_gguf, tmp_path / "fp32", precision="fp32")
    recipe = make_recipe("int4", 32, 4, "gptq")
    plan = make_plan(
        smollm2_gguf,
        recipe,
        revision=None,
        devices=("cpu",),
        budget=None,
        calibration=None,
        seed=0,
        integers=numerics == "w4a16",
    )
    (tmp_path / "npu").mkdir()
    npu = UncompiledStages(plan, replace(X_ELITE, cache_rows=WINDOW + 64), tmp_path / "npu", numerics)
    text = shared_data / "wikitext2" / "test.txt"
    cut = tokenize([tmp_path / "fp32"], text, 4 * WINDOW).reshape(4, WINDOW)
    scores = measure(npu, tmp_path / "fp32", cut, lambda: None)
    assert float(np.mean(scores.kl)) < 0.12
    assert "Paris" in answer(npu, tmp_path / "fp32", QUESTION)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("numerics", "quantize", "country", "capital"),
    [
        ("float16", "rtn", "France", "Paris"),
        ("w4a16", "rtn", "France", "Paris"),
        # the file's own blocks, about a country whose capital is no near tie in the float model
        ("float16", "auto", "Japan", "Tokyo"),
    ],
)
def test_it_answers_on_the_simulator(
    numerics: NpuNumerics, quantize: str, country: str, capital: str, smollm2_gguf: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")
    # a short cache: the simulator attends to every row of it
    target = replace(X_ELITE, cache_rows=WINDOW)
    options = ExportOptions(smollm2_gguf, tmp_path / "npu", quantize=quantize, npu_numerics=numerics)
    export_for_npu(options, target)
    with load(tmp_path / "npu", "snapdragon-x-elite") as model:
        said = model.chat(f"What is the capital of {country}?", max_new_tokens=7).result()
    assert capital in said.text
