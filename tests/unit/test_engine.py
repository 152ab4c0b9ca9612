"""What the engine asks of onnxruntime-genai, seen by a generator that keeps books instead of computing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgephi.runtime.engines.genai import PREFILL_CHUNK, OgEngine, capacity_for, common_prefix

SWITCH = 700
VOCABULARY = 1000


class Books:
    """Every cached token with the side of the switch its key was rotated for, as a LongRoPE graph decides it."""

    def __init__(self, switch: int | None) -> None:
        self.switch = switch
        self.calls: list[int] = []

    def new_generator(self, always_long: bool) -> Books:
        self.always_long = always_long
        self.cache: list[tuple[int, bool]] = []
        return self

    def side(self, length: int) -> bool:
        return self.switch is not None and length > self.switch

    def append_tokens(self, tokens: NDArray[np.int32]) -> None:
        assert tokens.dtype == np.int32
        assert tokens.size
        side = self.always_long or self.side(len(self.cache) + tokens.size)
        self.cache += [(int(token), side) for token in tokens]
        self.calls.append(tokens.size)

    def rewind_to(self, length: int) -> None:
        assert 0 <= length <= len(self.cache)
        del self.cache[length:]

    def get_logits(self) -> NDArray[np.float32]:
        assert {side for _, side in self.cache} == {self.side(len(self.cache))}, "keys of both sides in one cache"
        return np.zeros((1, 1, VOCABULARY), dtype=np.float32)


def engine_of(switch: int | None = None) -> tuple[OgEngine, Books]:
    books = Books(switch)
    return OgEngine(books.new_generator, 10_000, VOCABULARY, switch), books


def never() -> bool:
    return False


def test_a_provider_for_whole_prompts_gets_them_whole_and_then_token_by_token() -> None:
    """DirectML takes several tokens for the beginning of a sequence, whatever its cache holds."""
    books = Books(None)
    engine = OgEngine(books.new_generator, 10_000, VOCABULARY, whole_prompts=True)
    engine.prefill([1] * (2 * PREFILL_CHUNK + 3), never)
    assert books.calls == [2 * PREFILL_CHUNK + 3]
    engine.step(lambda logits: 7)
    engine.prefill([8, 9], never)
    assert books.calls[1:] == [1, 1, 1]
    assert engine.reuse([1] * 600) == 0
    engine.prefill([1] * 600, never)
    assert books.calls[-1] == 600


def test_a_prompt_is_computed_in_pieces() -> None:
    engine, books = engine_of()
    assert engine.prefill([1] * (2 * PREFILL_CHUNK + 3), never)
    assert books.calls == [PREFILL_CHUNK, PREFILL_CHUNK, 3]


def test_a_cancel_is_heard_between_two_pieces() -> None:
    engine, books = engine_of()
    assert not engine.prefill([1] * 1000, lambda: len(books.calls) == 2)
    assert len(engine.tokens) == len(books.cache) == 2 * PREFILL_CHUNK


def test_a_token_enters_the_cache_with_the_next_step() -> None:
    engine, books = engine_of()
    engine.prefill([5, 6], never)
    assert engine.step(lambda logits: 7) == 7
    assert list(engine.tokens) == [5, 6]
    engine.step(lambda logits: 8)
    engine.prefill([9], never)
    assert [token for token, _ in books.cache] == [5, 6, 7, 8, 9] == list(engine.tokens)


def test_a_rewind_forgets_the_token_not_yet_cached() -> None:
    engine, books = engine_of()
    engine.prefill([5, 6], never)
    engine.step(lambda logits: 7)
    engine.rewind(1)
    engine.prefill([3], never)
    assert [token for token, _ in books.cache] == [5, 3]


def test_reuse_keeps_the_common_prefix_and_leaves_one_token_to_compute() -> None:
    engine, _ = engine_of()
    engine.prefill([1, 2, 3, 4], never)
    assert engine.reuse([1, 2, 9, 9, 9]) == 2
    assert engine.reuse([1, 2]) == 1
    assert list(engine.tokens) == [1]


@pytest.mark.parametrize("length", [SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 2, 3 * SWITCH])
def test_a_prompt_on_either_side_of_the_rope_switch_is_computed_once(length: int) -> None:
    engine, books = engine_of(SWITCH)
    engine.prefill(list(range(1, 1000))[:5] * (length // 5) + [1] * (length % 5), never)
    engine.step(lambda logits: 1)
    assert sum(books.calls) == length
    assert max(books.calls) <= PREFILL_CHUNK
    assert engine.recomputed == 0


def test_a_cancel_is_heard_while_the_switch_is_crossed() -> None:
    engine, books = engine_of(SWITCH)
    engine.prefill([1] * SWITCH, never)
    engine.step(lambda logits: 7)
    assert not engine.prefill((), lambda: len(books.calls) == 4)
    assert len(engine.tokens) == len(books.cache) == PREFILL_CHUNK


def test_a_conversation_that_crosses_the_switch_reuses_nothing() -> None:
    engine, _ = engine_of(SWITCH)
    short, long = [1] * 600, [1] * 800
    engine.prefill(short, never)
    assert engine.reuse(long) == 0
    assert engine.recomputed == 600
    engine.prefill(long, never)
    assert engine.reuse([*long, 2]) == 800
    assert engine.recomputed == 0
    assert engine.reuse(short) == 0
    assert engine.recomputed == 599  # of a prompt, the last token is new work on any cache


@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("prefill"), st.integers(1, 900)),
            st.tuples(st.just("step"), st.integers(1, 12)),
            st.tuples(st.just("reuse"), st.integers(1, 1200)),
        ),
        max_size=8,
    )
)
def test_keys_of_both_sides_never_meet_and_no_token_is_lost(actions: list[tuple[str, int]]) -> None:
    engine, books = engine_of(SWITCH)
    engine.prefill([1] * 690, never)
    expected = [1] * 690
    for action, count in actions:
        if action == "prefill":
            engine.prefill([2] * count, never)
            expected += [2] * count
        elif action == "step":
            for _ in range(count):
                engine.step(lambda logits: 3)
            expected += [3] * count
        else:
            prompt = [*expected[: count // 2], *[4] * (count - count // 2)]
            engine.prefill(prompt[engine.reuse(prompt) :], never)
            expected = prompt
        engine.step(lambda logits: 3)  # looks at the logits, and so at the books
        expected.append(3)
        assert [token for token, _ in books.cache] == list(engine.tokens) == expected[:-1]


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 256), (256, 256), (257, 512), (999, 1000), (5000, 1000)])
def test_the_cache_is_rounded_up_and_never_beyond_the_context(tokens: int, capacity: int) -> None:
    assert capacity_for(tokens, 1000) == capacity


@pytest.mark.parametrize(
    ("a", "b", "length"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([1], [1, 2, 3], 1), ([5], [6], 0)]
)
def test_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert common_prefix(a, b) == length
