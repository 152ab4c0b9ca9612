"""Summaries. A text of several pieces is mapped and reduced: each piece is summarized, then the summaries together, in
as many levels as it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil
from typing import Literal, Unpack, get_args

from edgephi.arguments import require_choice, require_text, wrong
from edgephi.runtime.grammar import Regex
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import SamplingOptions
from edgephi.runtime.skills.facts import pattern_with_numbers_of
from edgephi.runtime.skills.pieces import SENTENCE_END, split
from edgephi.runtime.skills.prompts import Prompts, SkillPrompt
from edgephi.runtime.skills.run import SkillProgress, SkillRun, SkillStatistics, require_words, until_cancelled

Kind = Literal["text", "paragraph", "conversation"]
InputKind = Literal["general", "email"]
SHORTEST = 24
"""Tokens of a text that is its own summary."""
SLACK = 1.3
"""Tokens an answer may have over those it should have."""


@dataclass(frozen=True)
class ConversationItem:
    """What one person said or wrote."""

    speaker: str
    text: str
    when: str | None = None
    """The time, as it should be read."""


@dataclass(frozen=True)
class Summary:
    """A summary; never longer than its source, in characters and in tokens."""

    text: str
    parts: tuple[str, ...]
    """Summaries of the pieces of a long text, in their order; empty for one that was read at once."""
    levels: int
    """Times summaries were summarized."""
    cut: bool
    """The model would have gone on: the text ends with its last whole sentence, if there is one."""
    cancelled: bool
    """The text is as far as it was written."""
    statistics: SkillStatistics


def summarize(
    model: Model,
    text: str | Sequence[ConversationItem],
    *,
    kind: Kind = "text",
    input_kind: InputKind = "general",
    prompts: Prompts | None = None,
    on_progress: Callable[[SkillProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Summary:
    """Summarize a text of any length.

    The numbers of a summary are numbers of the text: no other can be written. A text of at most 24 tokens is its own
    summary, and the model is not asked.

    Args:
        kind: `text`; `paragraph`, which is shorter; or `conversation`, whose summary says who wants and does what.
        text: of a conversation also its items in their order. An item is one line, so that nothing in it can look like
            another speaker's.
        input_kind: of a conversation: `general`, or `email`.
        prompts: a folder or a mapping with other prompts (`docs/skills.md`).
        on_progress: called with steps and new text.
        cancelled: asked every 20 ms, in another thread, whether to stop; the answer being written ends then.
        sampling: as for `Model.chat`; greedy by default.

    Raises:
        PromptError: the text is empty, or the model has no chat template.
        PromptTooLongError: the context has no room beside the prompt.
        UsageError: an argument of another type or outside its range, or prompts that cannot be used.
        EngineError: the model is closed.
        EdgephiError: what else `Model.chat` raises.
    """
    require_choice("kind", kind, get_args(Kind))
    require_choice("input_kind", input_kind, get_args(InputKind))
    source = require_words("text", _as_text(text, kind)).strip()
    name = f"summarize-{'email' if kind == 'conversation' and input_kind == 'email' else kind}"
    with SkillRun(model, prompts, on_progress, cancelled, sampling) as run:
        return _Summarizing(run, source, run.prompts[name], run.prompts["combine-summaries"]).result()


class _Summarizing:
    """One summary on its way."""

    def __init__(self, run: SkillRun, source: str, prompt: SkillPrompt, combine: SkillPrompt) -> None:
        self._run, self._source, self._prompt, self._combine = run, source, prompt, combine
        self._parts: list[str] = []
        self._levels, self._cut, self._text = 0, False, ""

    def result(self) -> Summary:
        run, finished = self._run, False
        with until_cancelled():
            run.require_going()
            tokens = run.count(self._source)
            if tokens <= SHORTEST:
                run.plan(1)
                self._write(self._source)
            else:
                self._map_and_reduce(tokens)
            run.finish()
            finished = True
        return Summary(self._text, tuple(self._parts), self._levels, self._cut, not finished, run.statistics())

    def _map_and_reduce(self, tokens: int) -> None:
        run, prompt, text = self._run, self._prompt, self._source
        limit = run.room(prompt, _most_share(prompt), words=1000)
        if tokens > limit:
            limit = min(limit, run.room(self._combine, _most_share(self._combine), words=1000))
        pieces = split(text, limit, run.count)
        run.plan(_most_steps(tokens, limit, len(pieces)))
        while len(pieces) > 1:
            summaries: list[str] = [] if self._levels else self._parts
            for piece in pieces:
                summaries.append("".join(self._sentences(prompt, piece, part=True)))
                run.report(run.done + 1)
            prompt, text = self._combine, "\n\n".join(summaries)
            self._levels += 1
            pieces = split(text, limit, run.count)
        with closing(self._sentences(prompt, text)) as sentences:
            for sentence in sentences:
                self._write(sentence)

    def _write(self, text: str) -> None:
        self._text += text
        self._run.say(text)

    def _sentences(self, prompt: SkillPrompt, text: str, *, part: bool = False) -> Generator[str]:
        """The summary of a text, a sentence at a time, as soon as it is whole.

        A part's has at most half the tokens of its text, so that every level is shorter than the one before.
        """
        run, longest, repeats = self._run, len(text.strip()), False
        tokens = run.count(text)
        wanted = min(max(SHORTEST, round(tokens * prompt.answer_share)), prompt.most_answer_tokens)
        most = max(1, min(tokens // 2 if part else tokens, round(wanted * SLACK)))
        form = Regex(pattern_with_numbers_of(text))
        pending, written, said = "", 0, set[str]()
        with closing(run.ask(prompt, most, form, text=text, words=max(10, round(wanted * 0.7)))) as pieces:
            for piece in pieces:
                pending += piece
                if end := _whole_sentences(pending, longest - written):
                    sentence, pending = pending[:end], pending[end:]
                    if sentence.strip() in said:  # a model that says a sentence again goes on doing so
                        repeats, pending = True, ""
                        break
                    yield sentence
                    written += end
                    said.add(sentence.strip())
        pending = pending.rstrip()
        if pending.strip() in said:
            pending = ""
        self._cut = repeats or run.answer.finish != "stop" or len(pending) > longest - written
        if self._cut:
            end = _whole_sentences(pending + "\n", longest - written)
            pending = pending[:end] if end or written else _whole_words(pending, longest)
        if pending:
            yield pending


def _whole_sentences(text: str, longest: int) -> int:
    """Characters of whole sentences at the beginning of a text, at most so many."""
    return max((found.end() for found in SENTENCE_END.finditer(text) if found.end() <= longest), default=0)


def _whole_words(text: str, longest: int) -> str:
    """The beginning of a text that was cut off: its last word may be half of one."""
    start = text[:longest]
    return start.rsplit(None, 1)[0] if len(start.split()) > 1 else start


def _most_share(prompt: SkillPrompt) -> float:
    """Tokens an answer may have, as a share of its text's."""
    return min(1.0, max(prompt.answer_share, SHORTEST / prompt.piece_tokens) * SLACK)


def _most_steps(tokens: int, limit: int, pieces: int) -> int:
    """Answers at most: every level has at most half the tokens of the one before, and breaks between its parts."""
    steps = 1
    while pieces > 1:
        steps += pieces
        tokens = tokens // 2 + 3 * pieces
        pieces = 2 * ceil(tokens / limit) if tokens > limit and tokens > 3 * pieces + 2 else 1
    return steps


def _as_text(text: object, kind: Kind) -> object:
    """A conversation's items as lines; anything else as it is."""
    if kind != "conversation" or isinstance(text, str) or not isinstance(text, Sequence):
        return text
    return "\n".join(_line(item) for item in text)


def _line(item: object) -> str:
    if not isinstance(item, ConversationItem):
        raise wrong("an item of the conversation", item, "ConversationItem(speaker, text)")
    for name, value in (("speaker", item.speaker), ("text", item.text), ("when", item.when or "")):
        require_text(f"{name} of an item of the conversation", value, "a text")
    # what divides a line is taken out of a speaker's name
    speaker = " ".join(re.sub("[:()]", " ", item.speaker).split())
    when = " ".join(re.sub("[()]", " ", item.when or "").split())
    return f"{speaker}{f' ({when})' if when else ''}: {' '.join(item.text.split())}"
