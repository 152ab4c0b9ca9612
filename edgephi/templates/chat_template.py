"""Chat templates: messages become the one text a model was trained on.

A template is a Jinja program that comes with a stranger's model. It is compiled and rendered in a child process
(`edgephi/templates/jinja_child.py`) within bounds of time and memory, never in this one: Jinja computes constants while
it compiles, so reading a template can already hang.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import TypeVar

from edgephi.bounded import BoundedChild, ChildDied, Exceeded
from edgephi.errors import EdgephiError, PromptError, TokenizerError
from edgephi.templates.dropped import dropped_messages, is_whole, refuse_dropped, refuse_form, refuse_media
from edgephi.templates.marked_values import Unclear, apart
from edgephi.templates.values import Message as Message
from edgephi.templates.values import template_values
from edgephi.tokenizer.control_tokens import ControlTokens

Answer = TypeVar("Answer")

SOURCE_LIMIT = 2**20
"""Characters of the largest template; the longest published ones have about 30,000."""
TIME_LIMIT = 5.0
"""Seconds that compiling may take, and rendering with all that belongs to it."""
MEMORY_LIMIT = 512 * 2**20
"""Bytes that compiling or rendering may take beyond what the child needs for itself."""
OUTPUT_LIMIT = 16 * 2**20
"""Characters of the longest prompt."""
_REMEDY = "Use the chat template of the published model"


_ASKS_FOR_NONE = re.compile(r"\bcontent\b['\"\]\s)]*\s+is\s+(?:not\s+)?none\b", re.IGNORECASE)


class ChatTemplate:
    """A template, the special tokens it may name, and the child process that renders it.

    The child starts with the first use and ends with `close`, with this object, or with this process. Several threads
    may render at once; they take turns.

    Args:
        source: the template's text.
        special_tokens: token by name, for instance {"bos_token": "<s>"}.
        now: the clock of `strftime_now`; replace it where the text must not change from day to day.
        wait: compile at once. Otherwise the child compiles in the background, and `check` or the first `render` says
            what it found.

    Raises:
        TokenizerError: the template is not valid Jinja (with the line), larger than SOURCE_LIMIT, or compiling it
            takes more time or memory than it may.
        DeviceError: no child process can be started (step `process`).
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
        wait: bool = True,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._now = now
        self._checking = threading.Lock()
        self._compiled = False
        self._fault: TokenizerError | None = None
        self._accepted: set[bytes] = set()
        self._kept: dict[ControlTokens, frozenset[str]] = {}
        _require_source(source)
        for name, token in self._special_tokens.items():
            _require_text(token, f"the {name}")
        self._child = BoundedChild("edgephi.templates.jinja_child", memory=MEMORY_LIMIT, seconds=TIME_LIMIT)
        if wait:
            try:
                self.check()
            except BaseException:
                self.close()
                raise
        else:
            threading.Thread(target=self._check_quietly, name="chat template", daemon=True).start()

    def _values(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, object],
    ) -> dict[str, object]:
        # `content is none` tells a message that only calls tools; without the key it would be false
        keep_none = _ASKS_FOR_NONE.search(self.source) is not None
        return template_values(messages, tools, add_generation_prompt, variables, keep_none=keep_none)

    def check(self) -> None:
        """Compile the template, once; the errors are those of the class."""
        with self._checking:
            if self._fault is not None:
                raise self._fault.with_traceback(None)
            if self._compiled:
                return
            try:
                self._compile()
            except TokenizerError as fault:
                self._fault = fault  # compiling takes as long the next time: a bomb is waited for once
                raise
            self._compiled = True

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for a conversation.

        Args:
            tools: JSON schemas of functions the model may call, for templates that know them.
            add_generation_prompt: end with the words that start an answer.
            variables: what else the template knows, for instance {"enable_thinking": False}.

        Raises:
            PromptError: no messages, malformed ones, or values that JSON cannot hold; or the template refuses them,
                leaves a message or the tools out, or takes more time, memory or text than it may.
            TokenizerError: see the class; only where it was made with `wait=False`.
            DeviceError: no child process can be started (step `process`).
        """
        given = self._values(messages, tools, add_generation_prompt, variables or {})
        return self._whole(given, messages, lambda text, time: text)

    def render_apart(
        self,
        messages: Sequence[Message],
        control: ControlTokens,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> tuple[str, str | None]:
        """The prompt for a conversation with marks inside the control tokens that its texts hold, and the mark.

        None for the mark: the texts hold none. In messages of the assistant tokens that are not special and that the
        template does not open or close messages with stay unmarked: an answer's own reasoning and calls.

        Raises:
            PromptError: as `render`, or the template takes the control tokens in the texts apart.
            TokenizerError, DeviceError: as `render`.
        """
        given = self._values(messages, tools, True, {})

        def marked(text: str, time: _Time) -> tuple[str, str | None]:
            try:
                kept = partial(self._kept_in_answers, control, time)
                return apart(given, text, control, kept, lambda values: self._try(values, time))
            except Unclear as unclear:
                raise PromptError(
                    "the chat template takes apart a text that looks like a control token",
                    where="messages",
                    remedy="Leave the control token out of the messages",
                ) from unclear

        return self._whole(given, messages, marked)

    def _whole(
        self, given: Mapping[str, object], messages: Sequence[Message], ready: Callable[[str, _Time], Answer]
    ) -> Answer:
        """What `ready` makes of the text for values of which the template leaves nothing out."""
        self.check()
        where = ", ".join(str(message["role"]) for message in messages[:8])
        refuse_media(given)
        try:
            time = _Time()
            try:
                text = self._text(given, time)
            except _Refused:
                refuse_form(given, lambda changed: self._try(changed, time))
                raise
            refuse_dropped(given, lambda marked: self._try(marked, time), self._accepted)
            return ready(text, time)
        except _Refused as refused:
            raise PromptError(
                f"the chat template refuses these messages: {refused}",
                where=where,
                remedy="Check the roles and their order, or send a raw prompt instead",
            ) from refused
        except _Bound as bound:
            raise PromptError(
                f"the chat template {bound} for these messages",
                where=where,
                remedy="Send fewer or shorter messages; if a short one does not work either, send a raw prompt instead",
            ) from bound

    def attempt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str | None:
        """What the template makes of messages, whether or not it leaves some out; None when it refuses them.

        For questions about the template itself: how it ends a turn, what it takes.

        Raises:
            TokenizerError: see the class, and rendering takes more time, memory or text than it may.
            DeviceError: no child process can be started (step `process`).
        """
        given = self._values(messages, tools, add_generation_prompt, {})
        return self._about_itself(lambda: self._try(given, _Time()))

    def takes(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, object]] | None = None) -> bool:
        """Whether the template renders a conversation and leaves nothing out; the errors are those of `attempt`."""
        given, time = self._values(messages, tools, True, {}), _Time()
        return self._about_itself(lambda: is_whole(given, lambda marked: self._try(marked, time)))

    def dropped(self, messages: Sequence[Message]) -> tuple[int, ...] | None:
        """Numbers of the messages the template leaves out, see `edgephi.templates.dropped`; errors as of `attempt`."""
        given, time = self._values(messages, None, True, {}), _Time()
        return self._about_itself(lambda: dropped_messages(given, lambda marked: self._try(marked, time)))

    def close(self) -> None:
        """End the child process; rendering again starts another."""
        self._child.close()

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _kept_in_answers(self, control: ControlTokens, time: _Time) -> frozenset[str]:
        """Control tokens that are not special, but for those with which the template opens and closes messages."""
        if control not in self._kept:
            texts: list[str | None] = []
            for form in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
                said: list[Message] = [{"role": role, "content": form("1")} for role in ("user", "assistant", "user")]
                answered: list[Message] = [*said[:2], {"role": "tool", "content": form("1")}]
                texts += [self._try(self._values(each, None, False, {}), time) for each in (said, answered)]
            opening = {token for text in texts if text is not None for _, token in control.found(text)}
            kept = frozenset(token.text for token in control.tokens if not token.special) - opening
            # a template that refuses such a conversation tells nothing about its tokens
            self._kept[control] = kept if any(texts) else frozenset()
        return self._kept[control]

    def _compile(self) -> None:
        try:
            self._call({}, _Time())
        except _Refused as refused:
            line = refused.line
            raise TokenizerError(
                f"the chat template is not valid Jinja: {refused}",
                where=None if line is None else f"line {line}",
                remedy=_REMEDY,
            ) from refused
        except _Bound as bound:
            raise TokenizerError(f"the chat template {bound} while it is compiled", remedy=_REMEDY) from bound

    def _about_itself(self, question: Callable[[], Answer]) -> Answer:
        self.check()
        try:
            return question()
        except _Bound as bound:
            raise TokenizerError(f"the chat template {bound} for a short conversation", remedy=_REMEDY) from bound

    def _check_quietly(self) -> None:
        with suppress(EdgephiError):  # the same comes again where somebody waits for it
            self.check()

    def _try(self, given: Mapping[str, object], time: _Time) -> str | None:
        try:
            return self._text(given, time)
        except _Refused:
            return None

    def _text(self, given: Mapping[str, object], time: _Time) -> str:
        return self._call({"variables": {**self._special_tokens, **given}}, time).decode()

    def _call(self, request: Mapping[str, object], time: _Time) -> bytes:
        """Raises _Refused, _Bound, DeviceError."""
        now = self._now().isoformat()
        request = {"source": self.source, "now": now, "output": OUTPUT_LIMIT, **request}
        try:
            header, body = self._child.call(request, seconds=time.left)
        except Exceeded as exceeded:
            bounds = {"time": f"{TIME_LIMIT:g} s", "memory": f"{MEMORY_LIMIT >> 20} MB of memory"}
            raise _Bound(f"takes more than {bounds[exceeded.bound]}") from exceeded
        except ChildDied as died:
            raise _Bound(f"ends the process that runs it ({died})") from died
        time.left -= float(str(header["seconds"]))
        fault = header.get("fault")
        if fault == "output":
            raise _Bound(f"writes more than {OUTPUT_LIMIT:,} characters")
        if fault is not None:
            line = header.get("line")
            raise _Refused(str(header.get("message")), line if isinstance(line, int) else None)
        return body


def render(
    source: str,
    special_tokens: Mapping[str, str],
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, object] | None = None,
    now: Callable[[], datetime] = datetime.now,
) -> str:
    """One conversation through one template; arguments and errors are those of `ChatTemplate` and its `render`.

    It starts a process of its own (0.1 s); for more than one conversation keep a `ChatTemplate`.
    """
    with ChatTemplate(source, special_tokens, now=now) as template:
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables)


@dataclass
class _Time:
    """Seconds that are left of TIME_LIMIT for all that one call of `render` has the child do."""

    left: float = field(default_factory=lambda: TIME_LIMIT)


class _Refused(Exception):
    """The template is not valid or raised something; the text says what."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


class _Bound(Exception):
    """A bound was exceeded; the text is a predicate: "takes more than 5 s"."""


def _require_source(source: str) -> None:
    """Raises TokenizerError for a template that is too large or no text."""
    if len(source) > SOURCE_LIMIT:
        raise TokenizerError(
            f"the chat template has {len(source):,} characters, more than the {SOURCE_LIMIT:,} it may have",
            remedy=_REMEDY,
        )
    _require_text(source, "the chat template")


def _require_text(text: str, what: str) -> None:
    """Raises TokenizerError for what UTF-8 cannot hold; JSON and GGUF can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start:,} of {what} is half of a surrogate pair, which is no text", remedy=_REMEDY
        ) from error
