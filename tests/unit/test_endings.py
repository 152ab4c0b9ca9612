"""Stop texts are never half in an answer, and an answer that only repeats itself ends."""

from __future__ import annotations

import random

import pytest

from edgephi.runtime.text.endings import LEAST_TIMES, LEAST_TOKENS, Repetition, StopTexts


def through(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    watch, text = StopTexts(stops), ""
    for piece in pieces:
        given, stopped = watch.push(piece)
        text += given
        if stopped:
            return text, True
    return text + watch.finish(), False


def test_whatever_the_pieces_the_text_ends_before_the_first_stop() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(rng.choices("ab\n", k=rng.randrange(1, 30)))
        stops = ["".join(rng.choices("ab\n", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randrange(6))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        places = [text.find(stop) for stop in stops if stop in text]
        expected = (text[: min(places)], True) if places else (text, False)
        given = through(stops, pieces)
        # a shorter stop that ends first may hide a longer one that begins earlier: both texts are right then
        assert given[1] == expected[1]
        assert not any(stop in given[0] for stop in stops)
        assert text.startswith(given[0])
        if not any(a != b and (a in b or b in a) for a in stops for b in stops):
            assert len(given[0]) >= len(expected[0]) or given == expected


def test_nothing_is_held_back_longer_than_needed() -> None:
    watch = StopTexts(["STOP"])
    assert watch.push("a S") == ("a ", False)
    assert watch.push("T") == ("", False)
    assert watch.push("A") == ("STA", False)
    assert StopTexts([]).push("anything") == ("anything", False)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 12, 40, 64])
def test_a_phrase_over_and_over_ends_an_answer(period: int) -> None:
    watch, ended = Repetition(), None
    for place in range(1000):
        if watch.push(1000 if place < 11 else place % period):
            ended = place - 11
            break
    assert ended is not None
    assert max(LEAST_TOKENS, LEAST_TIMES * period) - 1 <= ended <= max(LEAST_TOKENS, LEAST_TIMES * period) + period


def test_text_that_varies_goes_on() -> None:
    rng = random.Random(1)
    watch = Repetition()
    assert not any(watch.push(rng.randrange(50)) for _ in range(3000))
    table = [token for row in range(60) for token in (1, 2, 3, 4, 5, 100 + row, 6)]
    watch = Repetition()
    assert not any(watch.push(token) for token in table), "rows that differ by one token are no repetition"
