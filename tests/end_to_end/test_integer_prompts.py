"""Prompts by integers with real weights: what they may lose on a text that nothing was fitted to, and a right answer.

The reference for the loss is the same model with activations in float.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from edgephi.ort import open_session, session_options
from edgephi.runtime.integers import make
from edgephi.runtime.integers.measure import measure_reference
from edgephi.runtime.integers.model_file import read_model
from edgephi.runtime.loading import load
from edgephi.runtime.prepacked.packing import GRAPH

WINDOWS, WINDOW, BEGIN = 4, 512, 20_000


@pytest.mark.slow
def test_smollm2_loses_little_on_wikitext_and_answers_as_before(
    smollm2_bundle: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path))
    monkeypatch.setattr(make, "LEAST_GAIN", 0.0)  # whether it pays is the processor's affair
    text = (shared_data / "wikitext2" / "test.txt").read_text(encoding="utf-8")[: 8 * WINDOWS * WINDOW + BEGIN]
    with load(smollm2_bundle, "cpu", prefill="integers") as model:
        assert model.prefill.folder is not None
        answer = model.chat("What is the capital of Japan?", max_new_tokens=20).result()
        tokens = model.tokenizer.encode(text[BEGIN:])
        integers = open_session(
            model.prefill.folder / GRAPH, session_options(optimizations="none"), where="test", remedy=""
        )
    assert "Tokyo" in answer.text
    windows = [tokens[start : start + WINDOW] for start in range(0, WINDOWS * WINDOW, WINDOW)]
    graph = read_model((smollm2_bundle / "model_rows.onnx").read_bytes())
    reference = measure_reference(graph, smollm2_bundle, windows)
    assert 0 < reference.blocks < reference.divergence(integers) < reference.blocks + 0.01
