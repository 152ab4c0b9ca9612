"""Sampling against its formulas."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgephi.errors import EngineError, UsageError
from edgephi.runtime.sampling import (
    LEAST_PENALTY,
    LEAST_TEMPERATURE,
    MOST_PENALTY,
    MOST_TEMPERATURE,
    Sampler,
    Sampling,
    SamplingOptions,
    chooser,
    make_sampling,
)

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
        {"temperature": 101},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_values_outside_their_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**arguments)  # type: ignore[arg-type]


def test_top_k_keeps_the_most_likely() -> None:
    expected = np.where(np.isin(np.arange(5), [1, 4]), softmax(LOGITS), 0)
    assert frequencies(Sampling(temperature=1, top_k=2, seed=3)) == pytest.approx(expected / expected.sum(), abs=0.018)
    ties = np.zeros(9, np.float32)
    choose = chooser(Sampling(temperature=1, top_k=3, seed=0))
    assert {choose(ties) for _ in range(200)} == {0, 1, 2}, "of equals those with the lowest numbers"


def test_min_p_leaves_out_what_is_less_likely_than_a_share_of_the_best() -> None:
    weights = softmax(LOGITS)
    expected = np.where(weights >= 0.5 * weights.max(), weights, 0)
    assert frequencies(Sampling(temperature=1, min_p=0.5, seed=4)) == pytest.approx(
        expected / expected.sum(), abs=0.018
    )


@given(
    logits=arrays(np.float32, st.integers(2, 3000), elements=st.floats(-30, 30, width=32)),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_what_is_drawn_passes_every_filter(
    logits: np.ndarray, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    token = chooser(Sampling(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed))(logits)
    weights = softmax(logits.astype(np.float64) - logits.max())
    likelier = weights > weights[token] * (1 + 1e-5)
    assert not top_k or likelier.sum() < top_k
    assert weights[token] >= min_p * weights.max() * (1 - 1e-5)
    kept = np.sort(weights)[::-1][: top_k or None]
    assert weights[likelier].sum() < top_p * kept.sum() + 1e-5


def test_a_large_vocabulary_is_drawn_with_its_probabilities() -> None:
    logits = np.linspace(-2, 2, 3000).astype(np.float32)
    choose = chooser(Sampling(temperature=1, seed=5))
    drawn = np.bincount([choose(logits) // 300 for _ in range(20_000)], minlength=10) / 20_000
    assert drawn == pytest.approx(softmax(logits).reshape(10, 300).sum(1), abs=0.018)


def test_penalties_follow_their_formulas() -> None:
    prompt = [0, 3]
    sampler = Sampler(Sampling(repetition_penalty=2.0, logprobs=5), prompt)
    assert sampler(LOGITS) == 1
    assert sampler(LOGITS) == 4, "token 1 has 3 / 2 now, token 4 has 2.5"
    assert sampler(LOGITS) == 2, "and it 1.25"
    negative = np.array([-1.0, -1.5, -3, -4], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0), [0])(negative) == 1, "a negative logit is multiplied"
    presence = Sampler(Sampling(presence_penalty=0.6))
    assert [presence(LOGITS) for _ in range(3)] == [1, 4, 1], "taken off once"
    frequency = Sampler(Sampling(frequency_penalty=0.6))
    assert [frequency(LOGITS) for _ in range(5)] == [1, 4, 1, 2, 4], "taken off as often as it came"
    assert Sampler(Sampling(logit_bias={3: 100, 0: 5}))(LOGITS) == 3


def test_dry_lowers_what_would_make_a_repeated_run_longer() -> None:
    row = np.zeros(10, np.float32)
    row[[5, 6]] = 1.0, 0.9
    history = [1, 2, 3, 5, 8, 1, 2, 3]
    assert Sampler(Sampling(dry_multiplier=1.0, dry_allowed_length=4), history)(row) == 5, "three are free"
    assert Sampler(Sampling(dry_multiplier=1.0, dry_allowed_length=3), history)(row) == 6
    strong = Sampler(Sampling(dry_multiplier=0.05, dry_base=2.0, dry_allowed_length=2), history)
    assert strong(row) == 5, "0.05 * 2 ** 1 leaves 5 at 0.9, the lower number of two equals"


def test_logprobs_are_the_models_own() -> None:
    sampler = Sampler(Sampling(logprobs=2, logit_bias={0: 50.0}))
    assert sampler(LOGITS) == 0
    (seen,) = sampler.logprobs
    expected = np.log(softmax(LOGITS.astype(np.float64)))
    assert seen.logprob == pytest.approx(expected[0], abs=1e-5)
    assert [token for token, _ in seen.top] == [1, 4]
    assert [value for _, value in seen.top] == pytest.approx(expected[[1, 4]], abs=1e-5)


def test_options_are_the_fields_of_sampling() -> None:
    assert list(SamplingOptions.__annotations__) == [one.name for one in fields(Sampling)]
    assert make_sampling({"top_k": 3}) == Sampling(top_k=3)
    with pytest.raises(UsageError, match=r"no argument 'temprature'.*temperature"):
        make_sampling({"temprature": 1})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e300},
        {"presence_penalty": float("nan")},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": {1: -101}},
        {"logit_bias": {2**31: 1}},
        {"logit_bias": {1: 1e300}},
        {"logit_bias": {10**30: 1.0}},
        {"dry_multiplier": 101},
        {"logit_bias": [1]},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300},
        {"dry_base": 0.5},
        {"dry_allowed_length": 0},
        {"stop": "\n"},
        {"stop": [""]},
        {"stop": ["a"] * 17},
        {"logprobs": 21},
        {"logprobs": True},
        {"stop_repetition": 1},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]  # what a caller could pass


@pytest.mark.filterwarnings("error")
def test_a_temperature_that_float32_has_not_is_one_it_has() -> None:
    rng = np.random.default_rng(0)
    for temperature in (1e-300, 1e-46, 1e-40):
        for more in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}):
            logits = rng.standard_normal(384).astype(np.float32)
            sampling = Sampling(temperature=temperature, seed=0, **more)  # type: ignore[arg-type]
            assert chooser(sampling)(logits) == int(np.argmax(logits))


def test_a_number_that_python_does_not_write_is_an_error_like_any_other() -> None:
    for name in ("seed", "max_new_tokens", "top_k"):
        with pytest.raises(UsageError, match=name):
            Sampling(**{name: -(10**5000)})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [0.0, LEAST_TEMPERATURE, MOST_TEMPERATURE])
@pytest.mark.parametrize("penalty", [LEAST_PENALTY, MOST_PENALTY])
def test_the_ends_of_the_ranges_choose_without_a_warning(temperature: float, penalty: float) -> None:
    sampling = Sampling(
        temperature=temperature,
        repetition_penalty=penalty,
        presence_penalty=100,
        logit_bias={1: 100, 2: -100},
        dry_multiplier=100,
        seed=0,
    )
    for scale in (1e-3, 1.0, 1e4):
        sampler = Sampler(sampling, [0, 1, 2, 0, 1])
        assert all(0 <= sampler(LOGITS * np.float32(scale)) < len(LOGITS) for _ in range(4))
