"""One call of a skill: its answers, their statistics, progress, and ending it early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType

from edgephi.arguments import wrong
from edgephi.errors import PromptError, PromptTooLongError
from edgephi.runtime.answer import Answer
from edgephi.runtime.grammar import ResponseFormat
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import SamplingOptions, make_sampling
from edgephi.runtime.skills.prompts import LEAST_PIECE, Prompts, SkillPrompt, read_prompts
from edgephi.runtime.stream import Stream

WATCH_S = 0.02
"""How often `cancelled` is called."""


@dataclass(frozen=True)
class SkillProgress:
    """How far a skill is. `done` never falls, `total` never changes, and at the end they are equal."""

    done: int
    total: int
    """Steps. A step is an answer of the model, or a piece of the text; where their number depends on answers, some
    are skipped at the end."""
    text_delta: str = ""
    """What the result has more: all deltas together are its text."""


@dataclass(frozen=True)
class SkillStatistics:
    """What a skill cost."""

    answers: int = 0
    """Times the model was asked."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Of the prompts, taken from the KV cache instead of computed."""
    new_tokens: int = 0
    seconds: float = 0.0
    """From the call to the result."""


class SkillCancelled(Exception):
    """Ends a skill from inside; no caller of a skill sees it."""


class SkillRun:
    """Asks a model for one call of a skill. A context manager, which ends the thread that watches `cancelled`.

    Args:
        on_progress: called with a SkillProgress, by the caller's thread.
        cancelled: called every 20 ms, by another thread; True ends the skill.
        sampling: of the caller; goes before that of the prompts. Its `max_new_tokens` makes answers shorter only.

    Raises:
        UsageError: an argument of another type, or outside its range.
    """

    def __init__(
        self,
        model: Model,
        prompts: Prompts | None,
        on_progress: Callable[[SkillProgress], None] | None,
        cancelled: Callable[[], bool] | None,
        sampling: SamplingOptions,
    ) -> None:
        for name, value in (("on_progress", on_progress), ("cancelled", cancelled)):
            if value is not None and not callable(value):
                raise wrong(name, value, "a function, or None")
        make_sampling(sampling)
        self.model, self.prompts = model, read_prompts(prompts)
        self._on_progress, self._ask_cancelled, self._sampling = on_progress, cancelled, sampling
        self._started = perf_counter()
        self._statistics = SkillStatistics()
        self._done, self._total = 0, 1
        self._cancelled = False
        self._failure: BaseException | None = None
        self._stream: Stream | None = None
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None
        self._overhead: int | None = None

    def __enter__(self) -> SkillRun:
        if self._ask_cancelled is not None:
            self._watcher = threading.Thread(target=self._watch, name="skill", daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._watcher is not None:
            self._watcher.join()

    def require_going(self) -> None:
        """Raises SkillCancelled when the caller has cancelled, and what `cancelled` raised."""
        if self._failure is not None:
            raise self._failure
        if self._cancelled or (self._ask_cancelled is not None and self._ask_cancelled()):
            raise SkillCancelled

    def plan(self, total: int) -> None:
        """How many steps there are; reports that none is done."""
        self._total = total
        self.report(0)

    def report(self, done: int, text_delta: str = "") -> None:
        """Steps that are done: all so far."""
        self._done = max(self._done, min(done, self._total))
        if self._on_progress is not None:
            self._on_progress(SkillProgress(self._done, self._total, text_delta))

    def say(self, text_delta: str) -> None:
        """Report text, and no step."""
        self.report(self._done, text_delta)

    @property
    def done(self) -> int:
        return self._done

    def finish(self) -> None:
        """Report that all is done, if that was not said."""
        if self._done < self._total:
            self.report(self._total)

    def count(self, text: str) -> int:
        """Tokens of a text inside a message."""
        if not text:
            return 0
        if self._overhead is None:
            self._overhead = self.model.count_tokens([{"role": "user", "content": "a"}]) - 1
        return max(1, self.model.count_tokens([{"role": "user", "content": text}]) - self._overhead)

    def room(self, prompt: SkillPrompt, answers: float, **values: object) -> int:
        """Tokens of text that fit beside a prompt and an answer of `answers` times as many.

        Raises:
            PromptTooLongError: hardly any.
        """
        used = self.model.count_tokens(prompt.messages(**{"text": "a", **values}))
        # a text's tokens can be a few more between others than alone
        room = int((self.model.context_length - used - 16) / (1 + answers) * 0.97)
        if room < LEAST_PIECE:
            raise PromptTooLongError(
                f"the model's context of {self.model.context_length:,} tokens leaves no room for a text beside the "
                f"skill's prompt of {used:,}",
                remedy="Use a bundle with a longer context, or shorter prompts or instructions",
            )
        return min(room, prompt.piece_tokens)

    def ask(
        self, prompt: SkillPrompt, max_new_tokens: int, form: ResponseFormat | None, **values: object
    ) -> Generator[str]:
        """Pieces of one answer; `self.answer` has it afterwards. Leaving the loop early cancels it.

        Raises (on iteration):
            SkillCancelled: the caller has cancelled.
        """
        self.require_going()
        wanted: SamplingOptions = {**prompt.sampling, **self._sampling}
        wanted["max_new_tokens"] = min(max_new_tokens, wanted.get("max_new_tokens", max_new_tokens))
        stream = self._stream = self.model.chat(prompt.messages(**values), response_format=form, **wanted)
        try:
            if self._cancelled:  # before there was a stream to cancel
                stream.cancel()
            yield from stream
        finally:
            if not stream.finished:
                stream.cancel()
            self._stream = None
            self.answer = stream.result()
            self._add(self.answer)
        self.require_going()

    answer: Answer

    def statistics(self) -> SkillStatistics:
        return replace(self._statistics, seconds=perf_counter() - self._started)

    def _add(self, answer: Answer) -> None:
        before = self._statistics
        self._statistics = SkillStatistics(
            before.answers + 1,
            before.prompt_tokens + answer.prompt_tokens,
            before.reused_tokens + answer.reused_tokens,
            before.new_tokens + answer.new_tokens,
        )

    def _watch(self) -> None:
        assert self._ask_cancelled is not None
        while not self._over.wait(WATCH_S):
            try:
                if not self._ask_cancelled():
                    continue
            except BaseException as problem:  # raised again by the caller's thread
                self._failure = problem
            self._cancelled = True
            stream = self._stream  # read once: the answer may end meanwhile; one that begins later looks itself
            if stream is not None:
                stream.cancel()
            return


@contextmanager
def until_cancelled() -> Iterator[None]:
    """A part of a skill that a cancel leaves."""
    try:
        yield
    except SkillCancelled:
        return


def require_words(name: str, text: object) -> str:
    """A text that is not blank.

    Raises:
        PromptError: it is blank, or no text.
    """
    if not isinstance(text, str):
        raise wrong(name, text, "a text", PromptError)
    if not text.strip():
        raise PromptError(f"{name} is empty", remedy="Give a text of at least one word")
    return text
