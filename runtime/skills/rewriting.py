"""Rewriting in another tone, or as an instruction says."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Unpack, get_args

from edgephi.arguments import require_choice, wrong
from edgephi.errors import UsageError
from edgephi.runtime.grammar import Regex
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import SamplingOptions
from edgephi.runtime.skills.facts import missing, names, pattern_with_numbers_of
from edgephi.runtime.skills.pieces import sentences, split
from edgephi.runtime.skills.prompts import Prompts, SkillPrompt
from edgephi.runtime.skills.run import SkillProgress, SkillRun, SkillStatistics, require_words, until_cancelled

Tone = Literal["default", "general", "casual", "concise", "formal"]
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class RewrittenPart:
    """A part of the source and what became of it."""

    source: str
    text: str
    unchanged: bool
    """The source's own words: the model lost a name or a number of it, or wrote too much, each time it was asked."""


@dataclass(frozen=True)
class Rewrite:
    """A rewritten text. Blank space around its parts is the source's."""

    text: str
    parts: tuple[RewrittenPart, ...]
    cancelled: bool
    """The text is as far as it was written."""
    statistics: SkillStatistics

    @property
    def unchanged(self) -> int:
        """Parts that are as they were."""
        return sum(part.unchanged for part in self.parts)


def rewrite(
    model: Model,
    text: str,
    *,
    tone: Tone = "default",
    instruction: str | None = None,
    keep_facts: bool | None = None,
    prompts: Prompts | None = None,
    on_progress: Callable[[SkillProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Rewrite:
    """Rewrite a text of any length, a piece at a time.

    A piece that loses one of its names or numbers, or becomes more than 1.5 times as long (concise: longer), is
    rewritten sentence by sentence, and a sentence to which that happens again stays as it is. The result says which
    parts did.

    Args:
        tone: `default` and `general` make it clear and correct, the others `casual`, `concise` or `formal`.
        instruction: what to do instead, such as "Write it as a poem."
        keep_facts: hold the names, numbers and length of the text. None: with a tone, and not with an instruction,
            which may ask for others.
        prompts: a folder or a mapping with other prompts (`docs/skills.md`).
        on_progress: called with steps and new text.
        cancelled: asked every 20 ms, in another thread, whether to stop; the answer being written ends then.
        sampling: as for `Model.chat`; greedy by default.

    Raises:
        PromptError: the text or the instruction is empty, or the model has no chat template.
        PromptTooLongError: the context has no room beside the prompt.
        UsageError: a tone together with an instruction, an argument of another type or outside its range, or prompts
            that cannot be used.
        EngineError: the model is closed.
        EdgephiError: what else `Model.chat` raises.
    """
    require_choice("tone", tone, get_args(Tone))
    source = require_words("text", text)
    values: dict[str, str] = {}
    if instruction is not None:
        values["instruction"] = require_words("instruction", instruction).strip()
        if tone != "default":
            raise UsageError("there are a tone and an instruction", remedy="Name the tone in the instruction")
    if keep_facts is not None and not isinstance(keep_facts, bool):
        raise wrong("keep_facts", keep_facts, "True, False or None")
    with SkillRun(model, prompts, on_progress, cancelled, sampling) as run:
        prompt = run.prompts[f"rewrite-{'custom' if values else tone}"]
        keep = keep_facts if keep_facts is not None else not values
        return _Rewriting(run, prompt, values, keep).result(source)


class _Rewriting:
    """One rewritten text on its way."""

    def __init__(self, run: SkillRun, prompt: SkillPrompt, values: dict[str, str], keep: bool) -> None:
        self._run, self._prompt, self._values, self._keep = run, prompt, values, keep
        self._names: list[str] = []
        self._parts: list[RewrittenPart] = []

    def result(self, source: str) -> Rewrite:
        run, finished = self._run, False
        with until_cancelled():
            run.require_going()
            self._names = names(source)
            limit = run.room(self._prompt, self._prompt.answer_share + 0.5, **self._values)
            pieces = split(source, limit, run.count)
            run.plan(len(pieces))
            for done, piece in enumerate(pieces, 1):
                self._rewrite(piece)
                run.report(done)
            finished = True
        return Rewrite("".join(part.text for part in self._parts), tuple(self._parts), not finished, run.statistics())

    def _rewrite(self, piece: str) -> None:
        """As a whole, else sentence by sentence, else not at all."""
        if not _LETTER.search(piece):
            self._add(RewrittenPart(piece, piece, unchanged=False))
        elif (text := self._attempt(piece)) is not None:
            self._add(RewrittenPart(piece, text, unchanged=False))
        elif len(parts := sentences(piece)) > 1:
            for part in parts:
                text = self._attempt(part) if _LETTER.search(part) else part
                self._add(RewrittenPart(part, part if text is None else text, unchanged=text is None))
        else:
            self._add(RewrittenPart(piece, piece, unchanged=True))

    def _add(self, part: RewrittenPart) -> None:
        self._parts.append(part)
        self._run.say(part.text)

    def _attempt(self, piece: str) -> str | None:
        """The piece rewritten, in its blank space; None: a name or number is missing, or it is too long."""
        run, prompt, core = self._run, self._prompt, piece.strip()
        most = max(SHORTEST_ANSWER, round(run.count(core) * prompt.answer_share))
        lines = "\n" in core or not self._keep
        form = Regex(pattern_with_numbers_of(core, lines=lines)) if self._keep else None
        with closing(run.ask(prompt, min(most, prompt.most_answer_tokens), form, text=core, **self._values)) as pieces:
            text = "".join(pieces).strip()
        longest = max(1.0, prompt.answer_share) * len(core)
        if (
            not text
            or run.answer.finish != "stop"
            or (self._keep and (len(text) > longest or missing(core, text, self._names)))
        ):
            return None
        start = len(piece) - len(piece.lstrip())
        return piece[:start] + text + piece[start + len(core) :]


SHORTEST_ANSWER = 24
"""Tokens that an answer may always have."""
