"""Chat templates: messages become the one text a model was trained on.

A template is a Jinja program that comes with a stranger's model. It is compiled and rendered in a child process
(`edgephi/jinja_child.py`) within bounds of time and memory, never in this one: Jinja computes constants while it
compiles, so reading a template can already hang.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import TypeVar

from edgephi.bounded import BoundedChild, ChildDied, Exceeded
from edgephi.dropped import is_whole, refuse_dropped
from edgephi.errors import EdgephiError, PromptError, TokenizerError
from edgephi.files import LONGEST_INTEGER

Answer = TypeVar("Answer")
Message = Mapping[str, object]
"""`role` and `content`, and what else a template asks for (`tools`, `tool_calls` …)."""

SOURCE_LIMIT = 2**20
"""Characters of the largest template; the longest published ones have about 30,000."""
TIME_LIMIT = 5.0
"""Seconds that compiling may take, and rendering with all that belongs to it."""
MEMORY_LIMIT = 512 * 2**20
"""Bytes that compiling or rendering may take beyond what the child needs for itself."""
OUTPUT_LIMIT = 16 * 2**20
"""Characters of the longest prompt."""
DEPTH_LIMIT = 100
"""Lists and objects inside each other, in messages and tools."""
_REMEDY = "Use the chat template of the published model"
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


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
        _require_source(source)
        self._child = BoundedChild("edgephi.jinja_child", memory=MEMORY_LIMIT, seconds=TIME_LIMIT)
        if wait:
            try:
                self.check()
            except BaseException:
                self.close()
                raise
        else:
            threading.Thread(target=self._check_quietly, name="chat template", daemon=True).start()

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
        given = _given(messages, tools, add_generation_prompt, variables or {})
        self.check()
        where = ", ".join(str(message["role"]) for message in messages[:8])
        try:
            time = _Time()
            text = self._text(given, time)
            refuse_dropped(given, lambda marked: self._try(marked, time), self._accepted)
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
        return text

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
        given = _given(messages, tools, add_generation_prompt, {})
        return self._about_itself(lambda: self._try(given, _Time()))

    def takes(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, object]] | None = None) -> bool:
        """Whether the template renders a conversation and leaves nothing out; the errors are those of `attempt`."""
        given, time = _given(messages, tools, True, {}), _Time()
        return self._about_itself(lambda: is_whole(given, lambda marked: self._try(marked, time)))

    def close(self) -> None:
        """End the child process; rendering again starts another."""
        self._child.close()

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start:,} of the chat template is half of a surrogate pair, which is no text",
            remedy=_REMEDY,
        ) from error


def _given(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, object]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, object],
) -> dict[str, object]:
    """What a template is given besides the special tokens, as plain JSON values.

    Raises:
        PromptError: see `ChatTemplate.render`.
    """
    if wrong := _RESERVED & set(variables):
        raise PromptError(f"{sorted(wrong)[0]} is no variable of its own", remedy="Give it as the argument it is")
    _check(messages)
    given: dict[str, object] = {
        # a value of None is left out, as in transformers: templates would write the word
        "messages": [
            {key: value for key, value in _object(message, f"messages[{index}]", 1).items() if value is not None}
            for index, message in enumerate(messages)
        ],
        # these two are defined even when unused: templates test them with `is none`
        "tools": None if tools is None else _plain(list(tools), "tools", 0),
        "documents": None,
        "add_generation_prompt": bool(add_generation_prompt),
        **_object(variables, "variables", 0),
    }
    return given


def _check(messages: Sequence[Message]) -> None:
    remedy = "Give a list of messages like {'role': 'user', 'content': 'Hello'}"
    if not messages:
        raise PromptError("there are no messages", remedy=remedy)
    for index, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or ("content" not in message and "tool_calls" not in message)
        ):
            raise PromptError("a message has no role or no content", where=f"message {index}", remedy=remedy)


def _object(value: Mapping[object, object] | Mapping[str, object], where: str, depth: int) -> dict[str, object]:
    plain: dict[str, object] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise PromptError(
                f"a key is {_named(key)}, and JSON has only texts as keys", where=where, remedy="Use a text as the key"
            )
        plain[_text(key, where)] = _plain(item, f"{where}.{key}", depth + 1)
    return plain


def _plain(value: object, where: str, depth: int) -> object:
    """A value as JSON has it: what a child process can be given, and all that a template may see.

    Raises:
        PromptError: JSON cannot hold it; the sentence names the place and the type.
    """
    if value is None or isinstance(value, bool):
        return value
    if depth > DEPTH_LIMIT:
        raise PromptError(
            f"lists or objects are more than {DEPTH_LIMIT} deep", where=where[:100], remedy="Flatten them"
        )
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int) and abs(value) < 10**LONGEST_INTEGER:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        return _object(value, where, depth)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise PromptError(
        f"{_named(value)} cannot be given to a chat template",
        where=where,
        remedy="Give texts, finite numbers, lists and dictionaries; a pydantic object has `model_dump(mode='json')`",
    )


def _text(value: str, where: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"character {error.start:,} is half of a surrogate pair, which is no text",
                where=where,
                remedy="Decode the text again, with errors='replace'",
            ) from error
    return str(value)


def _named(value: object) -> str:
    """What a value is, for a sentence."""
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, int):
        return f"an integer of more than {LONGEST_INTEGER} digits" if abs(value) >= 10**LONGEST_INTEGER else repr(value)
    return f"a value of type {type(value).__qualname__}"
