"""Moderation of prompts and answers: where an app, or a server, puts a classifier of its own.

edgephi has none: `NO_MODERATION`, the default, finds nothing in any text and says so. A moderator is a function of a
text and the side it comes from, `prompt` or `response`, that gives a severity for each category it finds something of.
The categories, the levels with their numbers, and what is allowed by default are those of Windows
(`Microsoft.Windows.AI.ContentSafety`, https://learn.microsoft.com/windows/ai/apis/content-moderation).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, cast, get_args

from edgephi.arguments import require_choice, require_text, wrong
from edgephi.runtime.stream import Stream
from edgephi.runtime.text.templates import Message

Category = Literal["hate", "sexual", "violent", "self_harm"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
Side = Literal["prompt", "response"]


class Severity(IntEnum):
    """How harmful a text is, with Windows' numbers."""

    MINIMUM = 10
    LOW = 11
    MEDIUM = 12
    HIGH = 13


Moderator = Callable[[str, Side], Mapping[str, Severity]]
"""Severities by category; a category that is not named is at its minimum. Several threads may call it at once."""


class NoModeration:
    """A moderator that finds nothing in any text."""

    description = "no moderation: texts are not looked at"

    def __call__(self, text: str, side: Side) -> Mapping[str, Severity]:
        return {}


NO_MODERATION = NoModeration()


@dataclass(frozen=True)
class Limits:
    """The highest severity that is allowed, of each category.

    Raises:
        UsageError: one is no Severity.
    """

    hate: Severity = Severity.MEDIUM
    sexual: Severity = Severity.MEDIUM
    violent: Severity = Severity.MEDIUM
    self_harm: Severity = Severity.MEDIUM

    def __post_init__(self) -> None:
        for category in CATEGORIES:
            object.__setattr__(self, category, as_severity(f"the limit of {category}", getattr(self, category)))


@dataclass(frozen=True)
class ContentFilter:
    """What is allowed in prompts and in responses.

    Raises:
        UsageError: one is no Limits.
    """

    prompt: Limits = field(default_factory=Limits)
    response: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for side in get_args(Side):
            if not isinstance(limits := getattr(self, side), Limits):
                raise wrong(f"the filter of the {side}", limits, "Limits")


@dataclass(frozen=True)
class Blocked:
    """Why a text is not allowed: its worst category."""

    side: Side
    category: Category
    severity: Severity
    allowed: Severity
    """The highest that is."""


@dataclass(frozen=True)
class Moderation:
    """A moderator with its limits: `check` for whole texts, `moderated` for an answer that is being written.

    What a moderator raises passes: nothing that it has not judged is given out.

    Raises:
        UsageError: a moderator that cannot be called, or another filter.
    """

    moderator: Moderator = NO_MODERATION
    content_filter: ContentFilter = field(default_factory=ContentFilter)

    def __post_init__(self) -> None:
        if not callable(self.moderator):
            raise wrong("the moderator", self.moderator, "a function of a text and its side")
        if not isinstance(self.content_filter, ContentFilter):
            raise wrong("the filter", self.content_filter, "a ContentFilter")

    @property
    def description(self) -> str:
        """What the moderator says of itself, or its name."""
        said = getattr(self.moderator, "description", None) or getattr(self.moderator, "__name__", None)
        return str(said or type(self.moderator).__name__)

    def check(self, text: str, side: Side) -> Blocked | None:
        """What is not allowed in a text; None: all is allowed.

        Raises:
            UsageError: the moderator gave something else than severities by category, or it is no text.
        """
        require_text("the text", text, "a text")
        require_choice("side", side, get_args(Side))
        found = self.moderator(text, side)
        if not isinstance(found, Mapping):
            raise wrong("what the moderator gave", found, "a mapping from categories to severities")
        limits = self.content_filter.prompt if side == "prompt" else self.content_filter.response
        worst: Blocked | None = None
        for name, value in found.items():
            if name not in CATEGORIES:
                raise wrong("a category of the moderator's", name, f"one of {', '.join(CATEGORIES)}")
            severity, allowed = as_severity(f"the moderator's severity of {name}", value), getattr(limits, name)
            if severity > allowed and (worst is None or severity > worst.severity):
                worst = Blocked(side, name, severity, allowed)
        return worst

    def check_prompt(self, messages: str | Sequence[Message]) -> Blocked | None:
        """What is not allowed in a prompt: the texts of all its messages together, those of the assistant left out.

        Raises:
            UsageError: neither a text nor a list of messages.
        """
        if isinstance(messages, str):
            return self.check(messages, "prompt")
        given: object = messages
        if not isinstance(given, Sequence) or not all(isinstance(message, Mapping) for message in given):
            raise wrong("messages", messages, "a text, or messages such as {'role': 'user', 'content': 'Hi'}")
        said = [text for message in messages if message.get("role") != "assistant" for text in _texts(message)]
        return self.check("\n".join(said), "prompt")


Hold = Literal["sentence", "answer"]
LONGEST_HELD = 400
"""Characters without the end of a sentence, after which a text is judged all the same."""
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]」』]*|\n")


class HeldText:
    """An answer that comes in pieces, each held back until the moderator has judged it.

    At the end of a sentence the answer so far is judged, from its beginning. Where it is not allowed, the sentence is
    not given out, nor anything behind it, and `blocked` says why. Sentences before it were allowed and are out already;
    who must not show them either holds the whole `answer`. Without a moderator (NO_MODERATION) nothing is held back.

    Args:
        hold: back until the end of a `sentence`, or of the `answer`.

    Raises:
        UsageError: another `hold`; from `push` and `finish`, what `Moderation.check` raises.
    """

    def __init__(self, moderation: Moderation, hold: Hold = "sentence") -> None:
        require_choice("hold", hold, get_args(Hold))
        self.blocked: Blocked | None = None
        self._moderation, self._hold = moderation, hold
        self._text, self._given = "", 0

    def push(self, piece: str) -> str:
        """What may be given out now."""
        self._text += piece
        if self._moderation.moderator is NO_MODERATION:
            return self._release(len(self._text))
        end = _end(self._text, self._given) if self._hold == "sentence" else self._given
        return self._judged(end) if end > self._given else ""

    def finish(self) -> str:
        """What was held back, if it may be given out; no more comes."""
        return self._judged(len(self._text)) if self._given < len(self._text) else ""

    def _judged(self, end: int) -> str:
        if self.blocked is None:
            # what has come of the next sentence is judged too: it may turn the sense of the one before it
            self.blocked = self._moderation.check(self._text, "response")
        return "" if self.blocked else self._release(end)

    def _release(self, end: int) -> str:
        start, self._given = self._given, end
        return self._text[start:end]


class Moderated(Iterator[str]):
    """Pieces of an answer that were judged before they are given out; see `HeldText`. Made by `moderated`."""

    def __init__(self, pieces: Iterable[str], held: HeldText) -> None:
        self._source, self._held = pieces, held
        self._pieces = self._judged()

    @property
    def blocked(self) -> Blocked | None:
        """Why the answer ended early; None: it did not, so far."""
        return self._held.blocked

    def __next__(self) -> str:
        return next(self._pieces)

    def _judged(self) -> Iterator[str]:
        try:
            for piece in self._source:
                if allowed := self._held.push(piece):
                    yield allowed
                if self.blocked:
                    return
            if rest := self._held.finish():
                yield rest
        finally:
            if isinstance(self._source, Stream) and not self._source.finished:
                self._source.cancel()
                self._source.result()


def moderated(pieces: Iterable[str], moderation: Moderation, hold: Hold = "sentence") -> Moderated:
    """An answer, such as the stream of `Model.chat`, in judged pieces. A stream that is blocked is cancelled.

    Raises:
        UsageError: another `hold`; on iteration, what `Moderation.check` raises.
    """
    return Moderated(pieces, HeldText(moderation, hold))


def as_severity(name: str, value: object) -> Severity:
    """A Severity, or the number of one.

    Raises:
        UsageError: it is none.
    """
    try:
        return Severity(cast(int, value))
    except ValueError:
        raise wrong(name, value, f"one of {', '.join(f'Severity.{each.name}' for each in Severity)}") from None


def _end(text: str, start: int) -> int:
    """Behind the last sentence that ends in a text from a place on."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text, start)]
    if ends:
        return ends[-1]
    return len(text) if len(text) - start >= LONGEST_HELD else start


def _texts(message: Message) -> Iterator[str]:
    """Of a message: its content, or the text parts of it."""
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, Sequence):
        for part in content:
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield part["text"]
            elif isinstance(part, str):
                yield part
