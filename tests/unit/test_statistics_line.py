"""The line about an answer: what was found, guessed and computed again, and nothing about what was not."""

from __future__ import annotations

import dataclasses

from edgephi.commands.chat.generate import NOT_ASKED_FOR, generate
from edgephi.commands.terminal.console import statistics
from edgephi.runtime.answer import Answer

PLAIN = Answer(
    text="Tokyo",
    prompt_tokens=37,
    reused_tokens=0,
    recomputed_tokens=0,
    new_tokens=9,
    token_ids=(1,) * 9,
    finish="stop",
    time_to_first_token_s=0.05,
    decode_tokens_per_s=200.0,
    total_s=0.1,
)


def test_a_plain_answer() -> None:
    expected = "37 prompt tokens, 9 new, first after 0.05 s, 200.0 tokens/s, 0.10 s in all, stop"
    assert statistics(PLAIN) == expected


def test_what_was_found_and_guessed_is_named() -> None:
    line = statistics(dataclasses.replace(PLAIN, reused_tokens=30, guessed_tokens=8, accepted_tokens=5))
    assert line.startswith("37 prompt tokens (30 from the cache), 9 new (5 of 8 guesses right), first")


def test_the_help_names_every_key_of_the_json() -> None:
    described = generate.__doc__ or ""
    for field in (one for one in dataclasses.fields(Answer) if one.name not in NOT_ASKED_FOR):
        assert field.name in described, field.name
