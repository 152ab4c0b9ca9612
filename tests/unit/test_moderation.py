"""Moderation: limits by category and side, and answers that are judged before they are given out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from edgephi.errors import UsageError
from edgephi.runtime.moderation import (
    CATEGORIES,
    NO_MODERATION,
    Blocked,
    ContentFilter,
    HeldText,
    Limits,
    Moderation,
    Severity,
    Side,
    moderated,
)


def words(text: str, side: Side) -> Mapping[str, Severity]:
    """A moderator for which some words are harmful."""
    found = {
        "insult": ("hate", Severity.LOW),
        "fight": ("violent", Severity.MEDIUM),
        "kill": ("violent", Severity.HIGH),
    }
    scores: dict[str, Severity] = {}
    for word, (category, severity) in found.items():
        if word in text:
            scores[category] = max(severity, scores.get(category, Severity.MINIMUM))
    return scores


def test_the_numbers_are_those_of_windows() -> None:
    assert {each.name: each.value for each in Severity} == {"MINIMUM": 10, "LOW": 11, "MEDIUM": 12, "HIGH": 13}
    assert CATEGORIES == ("hate", "sexual", "violent", "self_harm")


def test_the_default_is_no_moderation_and_says_so() -> None:
    moderation = Moderation()
    assert moderation.moderator is NO_MODERATION and "no moderation" in moderation.description
    assert moderation.check("kill", "prompt") is None
    assert list(moderated(["ki", "ll"], moderation)) == ["ki", "ll"], "and holds nothing back"


def test_each_category_has_a_limit_for_prompts_and_one_for_responses() -> None:
    strict = ContentFilter(response=Limits(hate=Severity.MINIMUM, violent=Severity.LOW))
    moderation = Moderation(words, strict)
    assert moderation.description == "words"
    assert moderation.check("an insult in a fight", "prompt") is None, "medium is allowed by default"
    assert moderation.check("kill", "prompt") == Blocked("prompt", "violent", Severity.HIGH, Severity.MEDIUM)
    assert moderation.check("an insult", "response") == Blocked("response", "hate", Severity.LOW, Severity.MINIMUM)
    both = moderation.check("an insult in a fight", "response")
    assert both == Blocked("response", "violent", Severity.MEDIUM, Severity.LOW), "the worst one is named"


def test_all_messages_but_the_assistants_are_a_prompt() -> None:
    moderation = Moderation(words)
    assert moderation.check_prompt("kill") is not None
    assert (
        moderation.check_prompt([{"role": "assistant", "content": "kill"}, {"role": "user", "content": "hm"}]) is None
    )
    parts = [{"type": "text", "text": "kill"}, {"type": "image_url"}]
    assert moderation.check_prompt([{"role": "user", "content": parts}, {"role": "user", "content": "hm"}]) is not None
    for bad in (None, 3, ["kill"], [["role", "user"]]):
        with pytest.raises(UsageError, match="messages"):
            moderation.check_prompt(bad)  # type: ignore[arg-type]


def test_sentences_are_judged_before_they_are_given_out() -> None:
    answer = moderated(["One. Tw", "o! They k", "ill. More"], Moderation(words))
    assert list(answer) == ["One.", " Two!"] and answer.blocked is not None
    assert answer.blocked.category == "violent" and answer.blocked.side == "response"


def test_a_word_that_comes_in_two_pieces_is_judged_whole() -> None:
    answer = moderated(["They k", "ill"], Moderation(words))
    assert list(answer) == [] and answer.blocked is not None


def test_a_whole_answer_can_be_held() -> None:
    assert list(moderated(["One. ", "They kill."], Moderation(words), "answer")) == []
    assert list(moderated(["One. ", "Two."], Moderation(words), "answer")) == ["One. Two."]


def test_an_answer_without_sentences_does_not_wait_for_ever() -> None:
    held = HeldText(Moderation(words))
    assert held.push("a" * 399) == "" and held.push("b") == "a" * 399 + "b"


def test_nothing_comes_behind_a_block() -> None:
    held = HeldText(Moderation(words))
    assert held.push("They kill. ") == "" and held.blocked is not None
    assert held.push("Fine. ") == "" and held.finish() == ""


def test_a_moderator_that_fails_lets_nothing_pass() -> None:
    def broken(text: str, side: Side) -> Mapping[str, Severity]:
        raise RuntimeError("no model")

    answer = moderated(["One.", " Two."], Moderation(broken))
    with pytest.raises(RuntimeError):
        next(answer)


@pytest.mark.parametrize("given", [{"violence": Severity.HIGH}, {"hate": 3}, {"hate": "high"}, [("hate", 13)]])
def test_a_moderator_that_answers_something_else_is_refused(given: object) -> None:
    with pytest.raises(UsageError):
        Moderation(lambda text, side: given).check("x", "prompt")  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Moderation(None),  # type: ignore[arg-type]
        lambda: Moderation(words, {"prompt": Limits()}),  # type: ignore[arg-type]
        lambda: ContentFilter(prompt=Severity.LOW),  # type: ignore[arg-type]
        lambda: Moderation().check(None, "prompt"),  # type: ignore[arg-type]
    ],
)
def test_what_could_judge_nothing_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()


def test_limits_are_severities() -> None:
    assert Limits(hate=11) == Limits(hate=Severity.LOW)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="limit of sexual"):
        Limits(sexual=4)  # type: ignore[arg-type]
