"""Sampling against its formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgephi.errors import EngineError, UsageError
from edgephi.runtime.sampling import Sampling, chooser

LOGITS = np.array([1.0, 3.0, 2.0, -4.0, 2.5], dtype=np.float32)


def frequencies(sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    choose = chooser(sampling)
    return np.bincount([choose(LOGITS) for _ in range(draws)], minlength=len(LOGITS)) / draws


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits)
    return weights / weights.sum()


def test_temperature_zero_is_greedy() -> None:
    assert chooser(Sampling())(LOGITS) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_the_softmax_of_the_scaled_logits(temperature: float) -> None:
    # 20,000 draws: the standard deviation of a frequency is at most 0.0036
    assert frequencies(Sampling(temperature=temperature, seed=1)) == pytest.approx(
        softmax(LOGITS / temperature), abs=0.018
    )


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_its_proportions() -> None:
    probabilities = softmax(LOGITS)  # 0.46, 0.28, 0.17, 0.06 … for tokens 1, 4, 2, 0
    assert probabilities[1] + probabilities[4] < 0.8 < probabilities[[1, 4, 2]].sum()
    expected = np.where(np.isin(np.arange(5), [1, 4, 2]), probabilities, 0)
    assert frequencies(Sampling(temperature=1, top_p=0.8, seed=2)) == pytest.approx(
        expected / expected.sum(), abs=0.018
    )


@given(
    logits=arrays(np.float32, st.integers(1, 50), elements=st.floats(-20, 20, width=32)),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.1, 5),
    seed=st.integers(0, 2**32),
)
def test_the_drawn_token_lies_in_the_nucleus(logits: np.ndarray, top_p: float, temperature: float, seed: int) -> None:
    token = chooser(Sampling(temperature=temperature, top_p=top_p, seed=seed))(logits)
    probabilities = softmax(logits.astype(np.float64) / temperature)
    likelier = probabilities[probabilities > probabilities[token] * (1 + 1e-9)].sum()
    assert likelier < top_p + 1e-9


def test_a_seed_repeats_an_answer_and_no_seed_does_not() -> None:
    def answer(seed: int | None) -> list[int]:
        choose = chooser(Sampling(temperature=2, seed=seed))
        return [choose(LOGITS) for _ in range(50)]

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)
    assert answer(None) != answer(None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(temperature: float, bad: float) -> None:
    logits = LOGITS.copy()
    logits[3] = bad
    with pytest.raises(EngineError, match="not finite"):
        chooser(Sampling(temperature=temperature))(logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_values_outside_their_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**arguments)  # type: ignore[arg-type]
