"""Guesses from the text so far: right where it repeats itself, silent where they do not pay."""

from __future__ import annotations

import numpy as np

from edgephi.runtime.speculation import MOST, PAUSE, Guesses, PromptLookup

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
    assert len(lookup.draft(repeated, 99)) == MOST
    lookup.learn(8, 1, 1.5)
    assert len(lookup.draft(repeated, 99)) == 2


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


def test_logits_are_given_for_the_guessed_tokens_only() -> None:
    guesses, rows = Guesses(), [np.full(3, value, np.float32) for value in (1, 2, 3)]
    guesses.verified([5, 6, 7], rows, 0.1)
    assert guesses.take(5) is rows[0]
    assert guesses.take(9) is None
    assert len(guesses) == 2
    assert guesses.drop() == 2
    assert guesses.drop() == 0
    assert (guesses.lookup.drafted, guesses.lookup.accepted) == (3, 1)
    guesses.verified([5], rows[:1], 0.1)
    assert guesses.take(5) is rows[0]
    assert (guesses.lookup.drafted, guesses.lookup.accepted) == (4, 2)
