"""A prompt that is asked again gives the same numbers, bit for bit, whatever of it is found in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.runtime.engines.base import SHARED
from edgephi.runtime.engines.onnx_sequence import PREFILL_CHUNK, ROW_BLOCK, pieces
from edgephi.runtime.model import Model


@pytest.fixture(scope="module")
def model(smollm2_bundle: Path) -> Iterator[Model]:
    """Real weights: those of the tiny models are too small for a difference to be seen."""
    with edgephi.load(smollm2_bundle, threads=2, max_parallel=1) as model:
        yield model


def prompt_of(length: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(length).integers(100, 40_000, length).tolist()
    return tokens


def logits_of(model: Model, prompt: Sequence[int], scope: str | None = SHARED) -> tuple[int, NDArray[np.float32]]:
    """How many tokens of a prompt were found, and the logits behind it."""
    seen: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32]) -> int:
        seen.append(logits.copy())
        return int(np.argmax(logits))

    sequence = model.open_sequence(len(prompt) + 8, scope=scope)
    try:
        found = sequence.reuse(prompt)
        assert sequence.prefill(prompt[found:], lambda: False)
        for _ in range(2):
            sequence.step(choose)
    finally:
        sequence.close()
    return found, np.stack(seen)


def test_no_row_is_alone() -> None:
    for count in range(2, 4 * PREFILL_CHUNK):
        lengths = list(pieces(count))
        assert sum(lengths) == count and max(lengths) <= PREFILL_CHUNK
        assert all(length % ROW_BLOCK != 1 for length in lengths), (count, lengths)
    assert list(pieces(1)) == [1]
    assert list(pieces(3 * PREFILL_CHUNK)) == [PREFILL_CHUNK] * 3


@pytest.mark.parametrize("length", [1, 2, 3, 40, 129, 257])
def test_logits_are_the_same_at_the_second_asking(model: Model, length: int) -> None:
    prompt = prompt_of(length)
    _, alone = logits_of(model, prompt, scope=None)
    logits_of(model, prompt)
    found, again = logits_of(model, prompt)
    assert found == max(0, length - 2)
    np.testing.assert_array_equal(again, alone)


def test_logits_are_the_same_behind_the_beginning_of_another(model: Model) -> None:
    prompt = prompt_of(260)
    _, alone = logits_of(model, prompt, scope=None)
    for shared in (20, 129, 257, 258):
        logits_of(model, [*prompt[:shared], *prompt_of(3)])
        found, again = logits_of(model, prompt)
        assert found >= shared - 2
        np.testing.assert_array_equal(again, alone)


def test_greedy_answers_are_the_same(model: Model) -> None:
    questions = ["What is the capital of Japan?", "Write a line about the sea.", "How do birds fly?"]
    for question in questions:
        first, second = (model.chat(question, max_new_tokens=20).result() for _ in range(2))
        assert second.reused_tokens == first.prompt_tokens - 2
        assert second.token_ids == first.token_ids
