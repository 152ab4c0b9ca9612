"""Multiple-choice questions answered by likelihood, as the LM Evaluation Harness does (Gao et al. 2021).

Every choice is put behind the question, and the log-likelihoods of the choice's tokens are added. `accuracy` takes the
choice with the highest sum; `accuracy_normalized` divides the sum by the choice's UTF-8 bytes first, so that a long
choice does not lose for being long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgephi.errors import SourceError, UsageError
from edgephi.files import read_argument

Encode = Callable[[str], list[int]]
Item = TypeVar("Item", bound=BaseModel)


@dataclass(frozen=True)
class Question:
    """A prompt, what may follow it (separators included), and the index of what should."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Candidate:
    """One choice behind its prompt: the tokens from `start` on are the choice's."""

    question: int
    ids: NDArray[np.int64]
    start: int
    bytes: int


@dataclass(frozen=True)
class ChoiceScores:
    """Fractions of questions answered rightly; which choice was taken, for each question, by either rule."""

    questions: int
    accuracy: float
    accuracy_normalized: float
    chosen: tuple[int, ...]
    chosen_normalized: tuple[int, ...]


class _Piqa(BaseModel):
    """PIQA (Bisk et al. 2019, arXiv 1911.11641); the answers are in a file beside, one digit a line."""

    model_config = ConfigDict(frozen=True)
    goal: str
    sol1: str
    sol2: str


class _Generic(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)


def read_questions(path: Path, count: int | None = None) -> tuple[Question, ...]:
    """Read questions, one JSON object a line.

    Either {"prompt": …, "choices": […], "answer": i}, i counted from 0; or PIQA's {"goal", "sol1", "sol2"} with the
    answers in `NAME-labels.lst` beside NAME.jsonl. PIQA's prompt is "Question: GOAL\\nAnswer:". A choice is separated
    from its prompt by a space unless the prompt ends in one.

    Args:
        count: how many, from the beginning; None: all.

    Raises:
        SourceError: a file is missing or malformed; the message names the line.
    """
    lines = _lines(path)[:count]
    if not lines:
        raise SourceError("there are no questions", where=path, remedy="Name a file of JSON lines")
    if '"goal"' not in lines[0]:
        return tuple(_generic(line, f"{path}, line {number}") for number, line in enumerate(lines, 1))
    beside = path.with_name(f"{path.stem}-labels.lst")
    labels = _lines(beside)
    if len(labels) < len(lines):
        raise SourceError(f"{len(lines)} questions have {len(labels)} answers", where=beside, remedy="Complete it")
    numbered = enumerate(zip(lines, labels, strict=False), 1)
    return tuple(_piqa(line, label, f"{path}, line {number}") for number, (line, label) in numbered)


def candidates(questions: Sequence[Question], encode: Encode) -> list[Candidate]:
    """Every choice of every question, as tokens; a choice has at least one, and one before it.

    Raises:
        UsageError: a question whose prompt has no tokens, or a choice that adds none.
    """
    found = []
    for number, question in enumerate(questions):
        prompt = encode(question.prompt)
        for choice in question.choices:
            ids = encode(question.prompt + choice)
            # where the last token of the prompt and the first of the choice became one, the choice gets it
            start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            if not 0 < start < len(ids):
                raise UsageError(
                    f"question {number + 1} has a prompt or a choice without tokens of its own",
                    remedy="Give every question a prompt, and every choice a text",
                )
            found.append(Candidate(number, np.array(ids, np.int64), start, len(choice.strip().encode())))
    return found


def choose(questions: Sequence[Question], given: Sequence[Candidate], likelihoods: Sequence[float]) -> ChoiceScores:
    """Take the likeliest choice of each question.

    Args:
        likelihoods: ln p of each candidate's choice, in the candidates' order.
    """
    plain: list[list[float]] = [[] for _ in questions]
    normalized: list[list[float]] = [[] for _ in questions]
    for candidate, likelihood in zip(given, likelihoods, strict=True):
        plain[candidate.question].append(likelihood)
        normalized[candidate.question].append(likelihood / max(1, candidate.bytes))
    answers = [question.answer for question in questions]
    chosen = tuple(int(np.argmax(values)) for values in plain)
    chosen_normalized = tuple(int(np.argmax(values)) for values in normalized)
    return ChoiceScores(
        questions=len(questions),
        accuracy=float(np.mean(np.equal(chosen, answers))),
        accuracy_normalized=float(np.mean(np.equal(chosen_normalized, answers))),
        chosen=chosen,
        chosen_normalized=chosen_normalized,
    )


def _lines(path: Path) -> list[str]:
    text = read_argument(path, "the file of questions", error=SourceError)
    # not splitlines: a text may hold line separators of its own
    return [line for line in text.split("\n") if line.strip()]


def _generic(line: str, where: str) -> Question:
    item = _parse(_Generic, line, where)
    if item.answer >= len(item.choices):
        raise SourceError(
            f"the answer is {item.answer} of {len(item.choices)} choices", where=where, remedy="Count from 0"
        )
    gap = "" if item.prompt[-1].isspace() else " "
    return Question(item.prompt, tuple(gap + choice for choice in item.choices), item.answer)


def _piqa(line: str, label: str, where: str) -> Question:
    item = _parse(_Piqa, line, where)
    if label.strip() not in ("0", "1"):
        raise SourceError(f"the answer is {label.strip()!r}", where=where, remedy="Give 0 for sol1, 1 for sol2")
    return Question(f"Question: {item.goal}\nAnswer:", (f" {item.sol1}", f" {item.sol2}"), int(label))


def _parse(kind: type[Item], line: str, where: str) -> Item:
    try:
        return kind.model_validate(json.loads(line))
    except (ValidationError, ValueError, RecursionError) as error:
        raise SourceError(
            f"this is no question: {(str(error).splitlines() or [''])[0]}",
            where=where,
            remedy='Write {"prompt": …, "choices": […], "answer": i}, or {"goal": …, "sol1": …, "sol2": …}',
        ) from error
