"""The radix tree of prefixes against a plain list of everything that was put into it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from edgephi.runtime import prefix_cache as module
from edgephi.runtime.prefix_cache import PrefixCache, Rows
from tests.interrupts import struck_in

HEADS, SIZE = 2, 4


def rows_of(tokens: Sequence[int]) -> Rows:
    """Rows that depend on every token up to theirs, as a model's do: [2, heads, tokens, size]."""
    seen = np.cumsum([(token + 1) * (place + 1) for place, token in enumerate(tokens)], dtype=np.float32)
    return np.broadcast_to(seen[None, None, :, None], (2, HEADS, len(tokens), SIZE)).copy()


def reader(tokens: Sequence[int]) -> Callable[[int, int], Rows]:
    return lambda start, stop: rows_of(tokens)[:, :, start:stop]


def found(cache: PrefixCache, tokens: Sequence[int], kind: object = 0) -> int:
    """The length of a match, whose rows are compared."""
    length, pieces = cache.match(kind, tokens)  # type: ignore[arg-type]  # any kind goes
    assert sum(piece.shape[2] for piece in pieces) == length
    if pieces:
        np.testing.assert_array_equal(np.concatenate(pieces, axis=2), rows_of(tokens)[:, :, :length])
    return length


def test_every_prefix_of_anything_is_found_whole() -> None:
    random.seed(5)
    cache, stored = PrefixCache(2**30), list[list[int]]()
    for _ in range(300):
        base = random.choice(stored)[: random.randrange(30)] if stored and random.random() < 0.7 else []
        tokens = [*base, *(random.randrange(3) for _ in range(random.randrange(1, 20)))]
        expected = max((_shared(tokens, other) for other in stored), default=0)
        assert found(cache, tokens) == expected
        cache.insert(0, tokens, reader(tokens))
        stored.append(tokens)
    distinct = {tuple(tokens[:end]) for tokens in stored for end in range(1, len(tokens) + 1)}
    assert cache.stored_tokens == len(distinct), "what begins alike is stored once"
    assert cache.stored_bytes == cache.stored_tokens * 2 * HEADS * SIZE * 4


def test_what_is_stored_is_not_read_again() -> None:
    cache, asked = PrefixCache(2**30), list[tuple[int, int]]()

    def read(start: int, stop: int) -> Rows:
        asked.append((start, stop))
        return rows_of([1, 2, 3, 4, 5])[:, :, start:stop]

    cache.insert(0, [1, 2, 3], read)
    cache.insert(0, [1, 2, 3, 4, 5], read)
    cache.insert(0, [1, 2], read)
    assert asked == [(0, 3), (3, 5)]


def test_kinds_have_nothing_in_common() -> None:
    cache = PrefixCache(2**30)
    cache.insert((False, "a"), [1, 2, 3], reader([1, 2, 3]))
    assert found(cache, [1, 2, 3], (False, "a")) == 3
    assert found(cache, [1, 2, 3], (True, "a")) == found(cache, [1, 2, 3], (False, "b")) == 0


def test_what_was_not_used_for_longest_makes_room() -> None:
    cache = PrefixCache(20 * 2 * HEADS * SIZE * 4)
    first, second, third = ([start, *range(100, 109)] for start in (1, 2, 3))
    cache.insert(0, first, reader(first))
    cache.insert(0, second, reader(second))
    assert found(cache, first) == 10, "used last now"
    cache.insert(0, third, reader(third))
    assert (found(cache, second), found(cache, first), found(cache, third)) == (0, 10, 10)
    assert (cache.stored_tokens, cache.evicted_tokens) == (20, 10)


def test_leaves_go_before_what_they_begin_with() -> None:
    cache = PrefixCache(24 * 2 * HEADS * SIZE * 4)
    system = list(range(20))
    for question in range(50, 70):
        tokens = [*system, question, question + 100]
        cache.insert(0, tokens, reader(tokens))
    assert found(cache, system) == 20
    assert cache.stored_tokens <= 24


def test_a_pinned_prefix_stays_until_it_is_let_go() -> None:
    cache = PrefixCache(10 * 2 * HEADS * SIZE * 4)
    kept = list(range(8))
    unpin = cache.pin(0, kept, reader(kept))
    for start in range(20, 60):
        other = list(range(start * 100, start * 100 + 9))
        cache.insert(0, other, reader(other))
    assert (found(cache, kept), cache.pinned) == (8, 1)
    branch = [0, 1, 2, 77]
    cache.insert(0, branch, reader(branch))
    assert found(cache, kept) == 8, "divided, and still whole"
    unpin()
    unpin()  # Ctrl-C may have it done twice
    assert cache.pinned == 0
    for start in range(70, 90):
        other = list(range(start * 100, start * 100 + 9))
        cache.insert(0, other, reader(other))
    assert found(cache, kept) == 0


@pytest.mark.parametrize("limit", [0, 1])
def test_a_cache_without_room_keeps_nothing(limit: int) -> None:
    cache = PrefixCache(limit)
    cache.insert(0, [1, 2, 3], reader([1, 2, 3]))
    assert found(cache, [1, 2, 3]) == cache.stored_bytes == 0


def test_ctrl_c_anywhere_leaves_the_count_right() -> None:
    rng, struck = random.Random(3), 0
    cache = PrefixCache(120 * 2 * HEADS * SIZE * 4)
    for number in range(400):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
        struck += struck_in(lambda tokens=tokens: cache.insert(0, tokens, reader(tokens)), number % 80, module)  # type: ignore[misc]
        nodes = list(cache._nodes())
        assert cache.stored_tokens == sum(len(node.tokens) for node in nodes)
        assert cache.stored_bytes == sum(node.rows.nbytes for node in nodes)
        found(cache, tokens)
    assert struck > 200


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
