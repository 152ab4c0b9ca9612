"""The NPU's graphs as the quality benchmark drives them give what the NPU's own driver gives, on the same kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgephi
from edgephi.benchmarks.studies.npu_quality import measure
from edgephi.benchmarks.studies.npu_stages import UncompiledStages
from edgephi.export.plan import make_plan
from edgephi.export.weights.recipe import make_recipe
from tests.npu_reference import X_ELITE, cpu_stages
from tests.tiny_phi import PHI_4_MINI, TOKENS, tiny_phi

CONTEXT = 320


def uncompiled(source: Path, folder: Path) -> UncompiledStages:
    recipe = make_recipe("int4", 32, 4, "rtn")
    plan = make_plan(source, recipe, revision=None, devices=("cpu",), budget=None, calibration=None, seed=0)
    folder.mkdir()
    return UncompiledStages(plan, replace(X_ELITE, cache_rows=CONTEXT), folder)


def test_logits_of_chunks_and_of_single_tokens(tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "source", PHI_4_MINI, CONTEXT)
    npu = uncompiled(source, tmp_path / "npu")
    sequence, tokens = npu.sequence(), np.random.default_rng(0).integers(3, TOKENS, 103).tolist()
    ours = np.concatenate([npu.append(sequence, tokens[:100]), *(npu.append(sequence, [one]) for one in tokens[100:])])
    seen: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32]) -> int:
        seen.append(logits)
        return 0

    driver = cpu_stages(source, tmp_path / "reference").sequence(CONTEXT - 64)
    driver.prefill(tokens[:100], lambda: False)
    driver.step(choose)
    for token in tokens[100:]:
        driver.rewind(len(driver.tokens))
        driver.prefill([token], lambda: False)
        driver.step(choose)
    assert np.allclose(ours[-4:], np.array(seen), atol=1e-3)


def test_scores_against_a_float_bundle(tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "source", PHI_4_MINI, CONTEXT)
    edgephi.export(source, tmp_path / "fp32", precision="fp32")
    windows = np.random.default_rng(1).integers(3, TOKENS, (2, 90))
    scores = measure(uncompiled(source, tmp_path / "npu"), tmp_path / "fp32", windows, lambda: None)
    assert len(scores.kl) == 2 * 89
    # int4 against float: near, and not the same
    assert 1e-4 < scores.kl.mean() < 0.1
