"""Guesses from the text so far: right where it repeats itself, silent where they do not pay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgephi.runtime.speculation import GROWING, PAUSE, Guesses, Lengths, PromptLookup, repeats_exactly

TEXT = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def test_what_followed_a_phrase_before_is_the_guess() -> None:
    lookup = PromptLookup()
    assert lookup.draft([*TEXT, 90, 91, 12, 13, 14], 3) == [15, 16, 17]
    assert lookup.draft([*TEXT, 90, 91, 12, 13, 14, 15], 2) == [16, 17]
    assert lookup.draft([*TEXT, 90, 91, 12, 13, 14, 15, 77], 3) == [], "nothing stood behind 77"


def test_the_longest_phrase_and_the_last_place_decide() -> None:
    lookup = PromptLookup()
    tokens = [1, 2, 3, 40, 9, 2, 3, 50, 8, 7, 2, 3]
    assert lookup.draft(tokens, 4) == [], "a phrase of two is not believed yet"
    lookup.stepped(1.0)
    lookup.learn(4, 4, 1.5)
    assert lookup.draft([*tokens, 50, 8, 7, 2, 3], 2) == [50, 8]


def test_guesses_grow_while_they_are_right_and_shrink_when_wrong() -> None:
    lookup = PromptLookup()
    lookup.stepped(1.0)
    repeated = [*range(100, 140), 7, *range(100, 104)]
    assert len(lookup.draft(repeated, 99)) == 4
    lookup.learn(4, 4, 1.6)
    assert len(lookup.draft(repeated, 99)) == GROWING.most == 8
    lookup.learn(8, 1, 1.5)
    assert len(lookup.draft(repeated, 99)) == 2


def test_where_a_run_costs_the_same_every_guess_is_as_long_as_the_run() -> None:
    lookup, repeated = PromptLookup(Lengths.always(30)), [*range(100, 140), 7, *range(100, 104)]
    lookup.stepped(1.0)
    for accepted in (30, 2, 0):
        assert lookup.draft(repeated, 99) == [*range(104, 134)]
        lookup.learn(30, accepted, 1.0)
    assert len(lookup.draft(repeated, 20)) == 20


def test_it_stops_when_it_does_not_pay_and_comes_back() -> None:
    lookup, tokens = PromptLookup(), [*range(30), 7, *range(4)]
    lookup.stepped(1.0)
    for _ in range(2):
        assert lookup.draft(tokens, 4)
        lookup.learn(4, 0, 1.6)
    pause = 0
    while not lookup.draft(tokens, 4):
        pause += 1
        tokens = [*tokens, *range(1000 + 5 * pause, 1001 + 5 * pause), 1, 2, 3]
    assert pause == PAUSE
    lookup.learn(4, 0, 1.6)  # one more try, and twice the pause
    again = 0
    while not lookup.draft(tokens, 4):
        again += 1
    assert again == 2 * PAUSE


def test_never_trying_costs_little_where_nothing_repeats() -> None:
    """Of 1,000 tokens whose guesses are all wrong, few runs are wasted."""
    rng, lookup = np.random.default_rng(0), PromptLookup()
    lookup.stepped(1.0)
    tokens = [int(one) for one in rng.integers(0, 6, 50)]
    wasted = 0.0
    for _ in range(1000):
        guess = lookup.draft(tokens, 8)
        if guess:
            lookup.learn(len(guess), 0, 1.4)
            wasted += 0.4
        lookup.stepped(1.0)
        tokens.append(int(rng.integers(0, 6)))
    assert wasted / 1000 < 0.03


def test_what_is_known_is_given_for_the_guessed_tokens_only() -> None:
    guesses, cached = Guesses[str](lambda: True), [1, 5, 6, 7]
    guesses.verified([5, 6, 7], ["behind 5", "behind 6", "behind 7"], 0.1)
    assert guesses.asked_for(cached) == [1]
    assert guesses.take(5) == "behind 5"
    assert guesses.asked_for(cached) == [1, 5]
    assert guesses.counts == (3, 1)
    assert guesses.take(9) is None
    assert guesses.take(None) is None
    for _ in range(2):
        guesses.drop(cached)
        assert cached == [1, 5]
    assert guesses.counts == (3, 1)
    guesses.verified([8], ["behind 8"], 0.1)
    assert guesses.take(8) == "behind 8"
    assert guesses.counts == (4, 2)
    assert guesses.anew().counts == (0, 0)


def test_a_machine_that_may_not_verify_is_asked_once() -> None:
    asked: list[bool] = []

    def may_verify() -> bool:
        asked.append(False)
        return False

    guesses = Guesses[str](may_verify)
    for text in ([*TEXT, 90], [*TEXT, 90, 12, 13, 14], [*TEXT, 90, 12, 13, 14, 15]):
        assert guesses.draft(text, 8) == []
    assert len(asked) == 1
    assert Guesses[str](None).draft([*TEXT, 90, 12, 13, 14], 8) == []


def test_a_run_that_computes_tokens_otherwise_when_they_are_together_is_found() -> None:
    def exact(tokens: list[int], past: int) -> NDArray[np.float32]:
        return np.array([[token, past + place] for place, token in enumerate(tokens)], np.float32)

    def rounded(tokens: list[int], past: int) -> NDArray[np.float32]:
        return exact(tokens, past) + np.float32(1e-6 if 1 < len(tokens) < 8 else 0)

    assert repeats_exactly(exact, 50, (2, 5, 9))
    assert repeats_exactly(rounded, 50, (9,))
    assert not repeats_exactly(rounded, 50, (2, 5, 9))
