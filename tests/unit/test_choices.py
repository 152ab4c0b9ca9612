"""Multiple choice: how questions are read, where a choice's tokens begin, and the two rules that choose."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from edgephi.benchmarks.evaluate.choices import Question, candidates, choose, read_questions
from edgephi.errors import SourceError, UsageError


def letters(text: str) -> list[int]:
    """A token for every character, and one for the pair ": " as merging tokenizers have them."""
    return [ord(c) for c in text.replace(": ", "\u2192")]


def test_piqa_and_its_labels_beside(tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    items = [
        {"goal": "Boil water", "sol1": "Heat it", "sol2": "Cool it"},
        {"goal": "g", "sol1": "a\u2028b", "sol2": "c"},
    ]
    path.write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n", encoding="utf-8")
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    first, second = read_questions(path)
    assert first == Question("Question: Boil water\nAnswer:", (" Heat it", " Cool it"), 0)
    assert (second.choices[0], second.answer) == (" a\u2028b", 1)
    assert read_questions(path, 1) == (first,)


def test_the_generic_form_separates_by_one_space(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    items = [{"prompt": p, "choices": ["x", "y", "z"], "answer": 2} for p in ("The end is", "The end is\n")]
    path.write_text("\n".join(map(json.dumps, items)))
    assert [question.choices[0] for question in read_questions(path)] == [" x", "x"]


@pytest.mark.parametrize(
    ("line", "labels", "reason"),
    [
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', None, "the answer is 2 of 2"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', None, "line 1"),
        ('{"prompt": "", "choices": ["b", "c"], "answer": 0}', None, "line 1"),
        ("[[[", None, "line 1"),
        ('{"goal": "a", "sol1": "b", "sol2": "c"}', None, "valid-labels.lst"),
        ('{"goal": "a", "sol1": "b", "sol2": "c"}', "2", "the answer is '2'"),
        ('{"goal": "a", "sol1": "b", "sol2": "c"}', "\n", "1 questions have 0 answers"),
        ('{"goal": "a", "sol1": "b"}', "1", "sol2"),
        ("", None, "no questions"),
    ],
)
def test_malformed_questions_are_named(line: str, labels: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    path.write_text(line)
    if labels is not None:
        (tmp_path / "valid-labels.lst").write_text(labels)
    with pytest.raises(SourceError, match=reason):
        read_questions(path)


def test_a_token_that_spans_prompt_and_choice_belongs_to_the_choice() -> None:
    apart, merged = candidates([Question("ab", (" cd",), 0), Question("Q:", (" yes",), 0)], letters)
    assert (apart.ids.tolist(), apart.start, apart.bytes) == (letters("ab cd"), 2, 2)
    assert (merged.ids.tolist(), merged.start, merged.bytes) == (letters("Q: yes"), 1, 3)


@pytest.mark.parametrize("question", [Question("", ("a", "b"), 0), Question("a", ("b", ""), 0)])
def test_every_choice_has_tokens_and_something_before_them(question: Question) -> None:
    with pytest.raises(UsageError, match="question 1"):
        candidates([question], letters)


def test_the_sum_prefers_short_choices_and_the_quotient_does_not() -> None:
    """Per-token probabilities 0.5 of 3 tokens against 0.2 of one: 0.125 < 0.2, but per byte 0.5 > 0.2."""
    questions = [Question("p", (" abc", " d"), 0), Question("p", (" e", " f"), 1), Question("p", (" é", " gh"), 1)]
    given = candidates(questions, letters)
    likelihoods = [3 * math.log(0.5), math.log(0.2), -2.0, -1.0, -1.0, -1.1]
    scores = choose(questions, given, likelihoods)
    assert scores.chosen == (1, 1, 0)
    assert scores.chosen_normalized == (0, 1, 0)  # é is two bytes, as is gh
    assert (scores.accuracy, scores.accuracy_normalized) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
