"""What a sequence asks of onnxruntime-genai, seen by a generator that keeps books instead of computing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgephi.runtime.engines.base import capacity_for, common_prefix
from edgephi.runtime.engines.genai import PREFILL_CHUNK, OgSequence

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


def sequence_of(switch: int | None = None) -> tuple[OgSequence, Books]:
    books = Books(switch)
    return OgSequence(books.new_generator, 10_000, VOCABULARY, switch), books


def never() -> bool:
    return False


def test_a_provider_for_whole_prompts_gets_them_whole_and_then_token_by_token() -> None:
    """DirectML takes several tokens for the beginning of a sequence, whatever its cache holds."""
    books = Books(None)
    sequence = OgSequence(books.new_generator, 10_000, VOCABULARY, whole_prompts=True)
    sequence.prefill([1] * (2 * PREFILL_CHUNK + 3), never)
    assert books.calls == [2 * PREFILL_CHUNK + 3]
    sequence.step(lambda logits: 7)
    sequence.prefill([8, 9], never)
    assert books.calls[1:] == [1, 1, 1]
    assert sequence.reuse([1] * 600) == 0
    sequence.prefill([1] * 600, never)
    assert books.calls[-1] == 600


def test_a_prompt_is_computed_in_pieces() -> None:
    sequence, books = sequence_of()
    assert sequence.prefill([1] * (2 * PREFILL_CHUNK + 3), never)
    assert books.calls == [PREFILL_CHUNK, PREFILL_CHUNK, 3]


def test_a_cancel_is_heard_between_two_pieces() -> None:
    sequence, books = sequence_of()
    assert not sequence.prefill([1] * 1000, lambda: len(books.calls) == 2)
    assert len(sequence.tokens) == len(books.cache) == 2 * PREFILL_CHUNK


def test_a_token_enters_the_cache_with_the_next_step() -> None:
    sequence, books = sequence_of()
    sequence.prefill([5, 6], never)
    assert sequence.step(lambda logits: 7) == 7
    assert list(sequence.tokens) == [5, 6]
    sequence.step(lambda logits: 8)
    sequence.prefill([9], never)
    assert [token for token, _ in books.cache] == [5, 6, 7, 8, 9] == list(sequence.tokens)


def test_a_rewind_forgets_the_token_not_yet_cached() -> None:
    sequence, books = sequence_of()
    sequence.prefill([5, 6], never)
    sequence.step(lambda logits: 7)
    sequence.rewind(1)
    sequence.prefill([3], never)
    assert [token for token, _ in books.cache] == [5, 3]


def test_reuse_keeps_the_common_prefix_and_leaves_one_token_to_compute() -> None:
    sequence, _ = sequence_of()
    sequence.prefill([1, 2, 3, 4], never)
    assert sequence.reuse([1, 2, 9, 9, 9]) == 2
    assert sequence.reuse([1, 2]) == 1
    assert list(sequence.tokens) == [1]


@pytest.mark.parametrize("length", [SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 2, 3 * SWITCH])
def test_a_prompt_on_either_side_of_the_rope_switch_is_computed_once(length: int) -> None:
    sequence, books = sequence_of(SWITCH)
    sequence.prefill(list(range(1, 1000))[:5] * (length // 5) + [1] * (length % 5), never)
    sequence.step(lambda logits: 1)
    assert sum(books.calls) == length
    assert max(books.calls) <= PREFILL_CHUNK
    assert sequence.recomputed == 0


def test_a_cancel_is_heard_while_the_switch_is_crossed() -> None:
    sequence, books = sequence_of(SWITCH)
    sequence.prefill([1] * SWITCH, never)
    sequence.step(lambda logits: 7)
    assert not sequence.prefill((), lambda: len(books.calls) == 4)
    assert len(sequence.tokens) == len(books.cache) == PREFILL_CHUNK


def test_a_conversation_that_crosses_the_switch_reuses_nothing() -> None:
    sequence, _ = sequence_of(SWITCH)
    short, long = [1] * 600, [1] * 800
    sequence.prefill(short, never)
    assert sequence.reuse(long) == 0
    assert sequence.recomputed == 600
    sequence.prefill(long, never)
    assert sequence.reuse([*long, 2]) == 800
    assert sequence.recomputed == 0
    assert sequence.reuse(short) == 0
    assert sequence.recomputed == 599  # of a prompt, the last token is new work on any cache


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
    sequence, books = sequence_of(SWITCH)
    sequence.prefill([1] * 690, never)
    expected = [1] * 690
    for action, count in actions:
        if action == "prefill":
            sequence.prefill([2] * count, never)
            expected += [2] * count
        elif action == "step":
            for _ in range(count):
                sequence.step(lambda logits: 3)
            expected += [3] * count
        else:
            prompt = [*expected[: count // 2], *[4] * (count - count // 2)]
            sequence.prefill(prompt[sequence.reuse(prompt) :], never)
            expected = prompt
        sequence.step(lambda logits: 3)  # looks at the logits, and so at the books
        expected.append(3)
        assert [token for token, _ in books.cache] == list(sequence.tokens) == expected[:-1]


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 256), (256, 256), (257, 512), (999, 1000), (5000, 1000)])
def test_the_cache_is_rounded_up_and_never_beyond_the_context(tokens: int, capacity: int) -> None:
    assert capacity_for(tokens, 1000) == capacity


@pytest.mark.parametrize(
    ("a", "b", "length"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([1], [1, 2, 3], 1), ([5], [6], 0)]
)
def test_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert common_prefix(a, b) == length
