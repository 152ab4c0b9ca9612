"""Forks, saves and restores of the NPU's sequences, over a toy that computes from what lies in the cache."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgephi.errors import EngineError
from edgephi.runtime.engines.npu_sequence import KvCache, NpuGraphs, NpuSequence, verifies_exactly
from edgephi.runtime.engines.saved_cache import read_cache

CHUNK, CAPACITY, ROWS, VOCABULARY = 4, 24, 32, 50
KEY = {"engine": "toy"}


def run(tokens: Sequence[int], past: int, cache: KvCache) -> NDArray[np.float16]:
    """Keys are the tokens, values their squares mod 7; the hidden state sums what is cached up to each token."""
    for key, value in cache.arrays:
        key[0, 0, past : past + len(tokens), 0] = tokens
        value[0, 0, past : past + len(tokens), 0] = np.square(tokens) % 7
    key, value = cache.arrays[-1]
    weighted = np.cumsum(key[0, 0, :, 0].astype(np.int64) * 3 + value[0, 0, :, 0])
    return (weighted[past : past + len(tokens)] % VOCABULARY).astype(np.float16)[None, :, None]


def logits(hidden: NDArray[np.float16]) -> NDArray[np.float32]:
    return (np.arange(VOCABULARY) == hidden[0, 0, 0]).astype(np.float32)


def greedy(row: NDArray[np.float32]) -> int:
    return int(row.argmax())


def never() -> bool:
    return False


def empty_cache(dtype: str = "float16") -> KvCache:
    return KvCache(2, (1, 1, ROWS, 2), np.dtype(dtype))


def sequence(dtype: str = "float16", family: weakref.WeakSet[NpuSequence] | None = None) -> NpuSequence:
    joined = weakref.WeakSet() if family is None else family
    graphs = NpuGraphs(run, logits, CHUNK, VOCABULARY, key=KEY, family=joined)
    return NpuSequence(graphs, empty_cache(dtype), CAPACITY)


def continued(one: NpuSequence, count: int = 6) -> list[int]:
    return [one.step(greedy) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_fork_goes_on_as_its_origin_and_neither_sees_the_other(dtype: str) -> None:
    origin, alone = sequence(dtype), sequence(dtype)
    for one in (origin, alone):
        one.prefill([3, 1, 4, 1, 5], never)
        one.step(greedy)
    forked = origin.fork()
    assert list(forked.tokens) == list(origin.tokens) == [3, 1, 4, 1, 5]
    assert forked.capacity == origin.capacity
    forked.prefill([9, 9, 9], never)
    other = continued(forked)
    expected = continued(alone)
    assert continued(origin) == expected
    assert other != expected
    fresh = sequence(dtype)
    fresh.prefill(list(forked.tokens), never)
    assert all(np.array_equal(forked.cache.rows(8)[name], fresh.cache.rows(8)[name]) for name in fresh.cache.rows(8))


def test_a_fork_has_the_token_that_was_chosen_last() -> None:
    origin = sequence()
    origin.prefill([3, 1, 4], never)
    chosen = origin.step(greedy)
    forked = origin.fork()
    assert continued(forked) == continued(origin)
    assert list(forked.tokens)[3] == chosen


def test_a_fork_of_a_fork_rewinds_alone() -> None:
    origin = sequence()
    origin.prefill([3, 1, 4, 1], never)
    forked = origin.fork().fork()
    assert forked.reuse([3, 1, 7]) == 2
    assert list(origin.tokens) == [3, 1, 4, 1]


def test_only_the_rows_in_use_are_copied() -> None:
    origin = sequence()
    origin.prefill([3, 1, 4, 1, 5], never)  # the last chunk's padding lies behind them
    origin.cache.arrays[0][0][:, :, 5:] = 7
    assert not origin.fork().cache.arrays[0][0][:, :, 5:].any()


def test_forks_belong_to_the_engine_that_closes_them_and_to_nobody_else() -> None:
    family: weakref.WeakSet[NpuSequence] = weakref.WeakSet()
    origin = sequence(family=family)
    origin.prefill([3], never)
    forked = origin.fork()
    assert set(family) == {origin, forked}
    origin.close()
    assert continued(forked)
    del forked
    gc.collect()
    assert set(family) == {origin}


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_saved_sequence_goes_on_in_another_process_as_it_would_have(dtype: str, tmp_path: Path) -> None:
    origin = sequence(dtype)
    origin.prefill([3, 1, 4, 1, 5], never)
    origin.save(tmp_path / "a.cache")
    restored = sequence(dtype)
    tensors = restored.cache.tensors()
    restored.fill(read_cache(tmp_path / "a.cache", KEY, tensors, capacity=CAPACITY, vocabulary=VOCABULARY))
    assert list(restored.tokens) == [3, 1, 4, 1, 5]
    with pytest.raises(EngineError, match="nothing to continue"):
        restored.step(greedy)
    prompt = [3, 1, 4, 1, 5, 9, 2]
    for one in (origin, restored):
        assert one.reuse(prompt) == 5
        one.prefill(prompt[5:], never)
    assert continued(restored) == continued(origin)


def test_the_file_holds_the_rows_in_use_alone(tmp_path: Path) -> None:
    one = sequence()
    one.prefill([3, 1, 4, 1, 5], never)
    one.save(tmp_path / "a.cache")
    one.prefill([3] * 10, never)
    one.save(tmp_path / "b.cache")
    # per token: an id of 4 bytes, and two layers' keys and values of 2 x 2 bytes
    grown = (tmp_path / "b.cache").stat().st_size - (tmp_path / "a.cache").stat().st_size
    assert abs(grown - 10 * 20) < 40, "the header's numbers have more digits"


def test_nothing_is_saved_of_an_empty_sequence_and_nothing_done_with_a_closed_one(tmp_path: Path) -> None:
    one = sequence()
    with pytest.raises(EngineError, match="nothing to save"):
        one.save(tmp_path / "a.cache")
    one.close()
    for attempt in (one.fork, lambda: one.save(tmp_path / "a.cache")):
        with pytest.raises(EngineError, match="model was closed"):
            attempt()
    assert not list(tmp_path.iterdir())


class Copying:
    """A toy that says 3 to 8 again and again; how sure it is depends on everything in its cache.

    Attributes:
        runs: tokens of each run, padding included.
    """

    def __init__(self) -> None:
        self.runs: list[int] = []

    def run(self, tokens: Sequence[int], past: int, cache: KvCache) -> NDArray[np.float16]:
        self.runs.append(len(tokens))
        sums = run(tokens, past, cache)
        return np.concatenate([np.array([3 + (token - 2) % 6 for token in tokens])[None, :, None], sums], 2)

    def logits(self, hidden: NDArray[np.float16]) -> NDArray[np.float32]:
        following, total = hidden[0, 0]
        return np.where(np.arange(VOCABULARY) == following, 100 + total, 0).astype(np.float32)

    def sequence(self, speculate: bool, may_verify: Callable[[], bool] = lambda: True) -> NpuSequence:
        graphs = NpuGraphs(self.run, self.logits, CHUNK, VOCABULARY, may_verify=may_verify, key=KEY)
        return NpuSequence(graphs, empty_cache(), CAPACITY, speculate=speculate)


def said(one: NpuSequence, count: int) -> tuple[list[int], list[NDArray[np.float32]]]:
    """Tokens and the logits they were chosen by."""
    seen: list[NDArray[np.float32]] = []

    def choose(row: NDArray[np.float32]) -> int:
        seen.append(row)
        return greedy(row)

    return [one.step(choose) for _ in range(count)], seen


def require_same(one: NpuSequence, other: NpuSequence, count: int) -> None:
    (tokens, rows), (expected, expected_rows) = said(one, count), said(other, count)
    assert tokens == expected
    assert np.array_equal(rows, expected_rows)
    assert list(one.tokens) == list(other.tokens)


REPEATED = [3, 4, 5, 6, 7, 8, 3, 4, 5]


def test_right_guesses_take_the_place_of_padding_and_save_runs() -> None:
    toy, plain = Copying(), Copying()
    guessing, stepping = toy.sequence(speculate=True), plain.sequence(speculate=False)
    for one in (guessing, stepping):
        one.prefill(REPEATED, never)
    require_same(guessing, stepping, CAPACITY - len(REPEATED))
    assert plain.runs[3:] == [1] * 14
    assert toy.runs[3:] == [CHUNK] * 4, "of the last one the capacity leaves two guesses"
    assert guessing.guesses == (3 * 3 + 2, 3 * 3 + 1), "nobody asked for the last one"
    assert stepping.guesses == (0, 0)


def test_wrong_guesses_leave_no_trace() -> None:
    """The prompt goes on otherwise behind 4, 5, 6 than the toy does."""
    toy = Copying()
    guessing, stepping = toy.sequence(speculate=True), toy.sequence(speculate=False)
    for one in (guessing, stepping):
        one.prefill([4, 5, 6, 20, 21, 22, 4, 5], never)
    require_same(guessing, stepping, 4)
    assert guessing.guesses == (3, 0)
    for one in (guessing, stepping):
        one.rewind(9)
        one.prefill([30, 31], never)
    require_same(guessing, stepping, 3)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_forks_and_files_hold_what_was_asked_for_and_no_guesses(steps: int, tmp_path: Path) -> None:
    toy = Copying()
    origin, alone = toy.sequence(speculate=True), toy.sequence(speculate=False)
    for one in (origin, alone):
        one.prefill(REPEATED, never)
        said(one, steps)
    assert list(origin.tokens) == list(alone.tokens)
    forked = origin.fork(speculate=True)
    origin.save(tmp_path / "a.cache")
    restored = toy.sequence(speculate=False)
    tensors = restored.cache.tensors()
    restored.fill(read_cache(tmp_path / "a.cache", KEY, tensors, capacity=CAPACITY, vocabulary=VOCABULARY))
    assert list(restored.tokens) == list(alone.tokens)
    require_same(forked, alone.fork(), 6)
    assert forked.guesses[1]
    require_same(origin, alone, 6)
    assert origin.reuse([*REPEATED, 40]) == len(REPEATED)
    assert origin.guesses == (0, 0)


def test_where_verifying_changes_answers_nothing_is_guessed() -> None:
    toy = Copying()
    one = toy.sequence(speculate=True, may_verify=never)
    one.prefill(REPEATED, never)
    said(one, 10)
    assert one.guesses == (0, 0)
    assert toy.runs[3:] == [1] * 9


def test_graphs_that_differ_in_one_bit_are_told_apart() -> None:
    def coarse(tokens: Sequence[int], past: int, cache: KvCache) -> NDArray[np.float16]:
        hidden = run(tokens, past, cache)
        return np.nextafter(hidden, np.float16(99)) if len(tokens) == 1 else hidden

    assert verifies_exactly(run, empty_cache(), 8, VOCABULARY)
    assert not verifies_exactly(coarse, empty_cache(), 8, VOCABULARY)
