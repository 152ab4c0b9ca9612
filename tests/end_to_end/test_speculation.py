"""Guessed tokens save runs where an answer repeats its text, and change nothing: on a model that copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import process_time

import pytest

import edgephi
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from tests.tiny_phi import FIRST, copying_phi, cycle

CYCLE = 23
SHAPE: dict[str, object] = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "sliding_window": 2047,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    source = copying_phi(folder / "source", SHAPE, CYCLE)
    edgephi.export(source, folder / "bundle", quantize="rtn")
    return folder / "bundle"


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[Model]:
    with load(bundle, threads=1, speculation=False, prefix_cache_bytes=0) as model:
        yield model


@pytest.fixture(scope="module")
def guessing(bundle: Path) -> Iterator[Model]:
    with load(bundle, threads=1, speculation=True, prefix_cache_bytes=0) as model:
        yield model


PROMPT = cycle(CYCLE, CYCLE + 4)


def test_answers_are_equal_and_nearly_every_guess_is_right(plain: Model, guessing: Model) -> None:
    expected = plain.generate(PROMPT, max_new_tokens=200, stop_repetition=False).result()
    answer = guessing.generate(PROMPT, max_new_tokens=200, stop_repetition=False).result()
    assert answer.token_ids == expected.token_ids
    assert expected.guessed_tokens == 0
    assert answer.accepted_tokens > 150
    assert answer.accepted_tokens > 0.9 * answer.guessed_tokens


def test_copying_takes_less_than_half_of_the_time(plain: Model, guessing: Model) -> None:
    seconds: dict[str, list[float]] = {"plain": [], "guessing": []}
    for _ in range(3):
        for name, model in (("plain", plain), ("guessing", guessing)):
            started = process_time()  # what other processes do is not counted
            model.generate(PROMPT, max_new_tokens=400, stop_repetition=False).result()
            seconds[name].append(process_time() - started)
    assert min(seconds["plain"]) > 2 * min(seconds["guessing"]), seconds


def test_sampling_stays_what_it_was(plain: Model, guessing: Model) -> None:
    """Each token is drawn from its own logits, whether they were computed alone or with others."""
    drawn = [
        model.generate(PROMPT, max_new_tokens=60, temperature=3.0, seed=5).result().token_ids
        for model in (plain, guessing)
    ]
    assert drawn[0] == drawn[1]


def test_a_session_goes_on_behind_wrong_guesses(plain: Model, guessing: Model) -> None:
    texts = []
    for model in (plain, guessing):
        sequence = model.answering_sequence(400)
        prompt = model.tokenizer.encode(PROMPT)
        assert sequence.prefill(prompt, lambda: False)
        said = [sequence.step(lambda row: int(row.argmax())) for _ in range(40)]
        assert len(sequence.tokens) == len(prompt) + 39
        assert sequence.prefill([FIRST + 9, FIRST + 10], lambda: False)
        said += [sequence.step(lambda row: int(row.argmax())) for _ in range(40)]
        fork = sequence.fork()
        said += [one.step(lambda row: int(row.argmax())) for one in (fork, sequence)]
        sequence.rewind(len(prompt))
        assert sequence.reuse(prompt) == len(prompt) - 2
        assert sequence.prefill(prompt[-2:], lambda: False)
        said += [sequence.step(lambda row: int(row.argmax())) for _ in range(5)]
        texts.append(said)
        sequence.close()
        fork.close()
    assert texts[0] == texts[1]


def test_a_model_says_whether_it_guesses_and_why(bundle: Path, plain: Model, guessing: Model) -> None:
    assert (plain.speculation, guessing.speculation) == ("off, as asked for", "on, as asked for")
    with load(bundle, threads=1) as model:
        assert model.speculation.startswith("on, if a measurement")
        answer = model.generate(PROMPT, max_new_tokens=60, stop_repetition=False).result()
        exact = model.engine.measure_verification()  # type: ignore[attr-defined]  # the CPU's engine has it
        assert model.speculation.startswith("on: runs" if exact else "off: runs")
        assert (answer.guessed_tokens > 0) == exact
