"""The CPU's engine computes what onnxruntime-genai does, over the same weights and with the same operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.runtime.loading import load
from edgephi.runtime.model import Model

TEXT = "The quick brown fox jumps over the lazy dog, and a lighthouse shows ships the way. " * 25
CLOSE = 1e-3  # of a logit's spread: the same kernels add the same numbers; on one machine they are equal bit for bit
STEPS = 20


def decoded(model: Model) -> tuple[list[int], list[NDArray[np.float32]]]:
    """Greedy tokens behind a prompt of more than one piece, and the logits each was chosen from."""
    prompt, rows = model.tokenizer.encode(TEXT), list[NDArray[np.float32]]()

    def choose(row: NDArray[np.float32]) -> int:
        rows.append(row.astype(np.float32))
        return int(row.argmax())

    sequence = model.open_sequence(len(prompt) + STEPS)
    assert len(prompt) > 300
    assert sequence.prefill(prompt, lambda: False)
    tokens = [sequence.step(choose) for _ in range(STEPS)]
    sequence.close()
    return tokens, rows


def test_logits_and_tokens_equal_those_of_onnxruntime_genai(smollm2_bundle: Path) -> None:
    with load(smollm2_bundle, "cpu", threads=1, engine="genai") as genai:
        expected, theirs = decoded(genai)
    with load(smollm2_bundle, "cpu", threads=1) as model:
        tokens, ours = decoded(model)
    assert tokens == expected
    for row, other in zip(ours, theirs, strict=True):
        assert np.abs(row - other).max() < CLOSE * other.std()
