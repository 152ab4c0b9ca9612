"""Conversations in the shape that all interfaces are turned into, and what is told of their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgephi.errors import UsageError
from edgephi.runtime.answer import Answer
from edgephi.runtime.model import Model
from edgephi.runtime.openai_parameters import chat_arguments, is_supported
from edgephi.runtime.sampling import TokenLogprobs
from edgephi.runtime.server.errors import RequestError
from edgephi.runtime.server.settings import ServerSettings
from edgephi.runtime.stream import Stream
from edgephi.runtime.text.endings import StopTexts
from edgephi.runtime.text.tokenizer import Tokenizer
from edgephi.runtime.tools.formats import ToolFormat
from edgephi.runtime.tools.functions import ToolCall, as_json

Message = Mapping[str, object]
"""As OpenAI's chat completions have it."""


@dataclass(frozen=True)
class Conversation:
    """What a model is asked.

    Args:
        arguments: of `Model.chat`.
    """

    arguments: Mapping[str, Any]

    @property
    def messages(self) -> Sequence[Message]:
        messages: Sequence[Message] = self.arguments["messages"]
        return messages

    @property
    def has_tools(self) -> bool:
        return "tools" in self.arguments

    @property
    def must_call(self) -> bool:
        return bool(self.arguments.get("tool_choice", "auto") != "auto")

    @property
    def stops(self) -> Sequence[str]:
        stops: Sequence[str] = self.arguments.get("stop", ())
        return stops

    def ask(self, model: Model) -> Stream:
        """A stream; the errors are those of `Model.chat`."""
        return model.chat(**self.arguments)


def read_conversation(
    request: Mapping[str, object], settings: ServerSettings, names: Mapping[str, str] | None = None
) -> Conversation:
    """What a request to OpenAI's chat completions asks, by the table of `runtime/openai_parameters.py`.

    Args:
        names: what another interface calls its parameters, by their names in chat completions.

    Raises:
        RequestError: a parameter or a value that is not supported, or more tokens than the server allows.
    """
    try:
        arguments = chat_arguments(request)
    except UsageError as problem:
        raise _refused(problem, names or {}) from None
    wanted = arguments.setdefault("max_new_tokens", settings.max_tokens)
    if wanted > settings.max_tokens:
        name = "max_tokens" if request.get("max_tokens") is not None else "max_completion_tokens"
        name = (names or {}).get(name, name)
        raise RequestError(
            f"{name} is {str(wanted)[:20]}, and the server allows {settings.max_tokens:,}",
            remedy="Ask for fewer, or start the server with a larger --max-tokens",
            param=name,
            code="unsupported_value",
        )
    return Conversation(arguments)


def _refused(problem: UsageError, names: Mapping[str, str]) -> RequestError:
    """The same sentence, with the parameter as the request has it."""
    param, what = problem.where or "", problem.what
    parameter = param.partition("[")[0].partition(".")[0]
    if parameter in names:
        what, param = what.replace(parameter, names[parameter], 1), names[parameter]
    code = "unsupported_value" if is_supported(parameter) else "unsupported_parameter"
    where = f" ({param})" if param and param not in what else ""
    return RequestError(f"{what}{where}", remedy=problem.remedy, param=param or None, code=code)


def sampling_arguments(
    request: Mapping[str, object], settings: ServerSettings, names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """As `read_conversation`, of a request without messages: arguments of `Model.generate`."""
    asked = {**request, "messages": [{"role": "user", "content": ""}]}
    arguments = dict(read_conversation(asked, settings, names).arguments)
    del arguments["messages"]
    return arguments


class TextBeforeCalls:
    """The text of an answer that comes in pieces, up to where it begins to call tools.

    Args:
        form: how the model writes calls, if that is known.
        has_tools: whether it may call any; without, all is text.
        is_forced: whether the whole answer is calls.
    """

    def __init__(self, form: ToolFormat | None, *, has_tools: bool, is_forced: bool) -> None:
        openers = ("<|tool_call|>", "functools[", "<tool_call>") if form is None else form.openers
        self._stops = StopTexts([f"{one}[" if one.isalpha() else one for one in openers] if has_tools else ())
        self._has_tools, self._holds = has_tools, is_forced
        self._begun = False
        self.given = ""
        """Of the text, what was handed on."""

    def push(self, piece: str) -> str:
        """What is text for certain."""
        if self._has_tools and not self._begun and (beginning := piece.lstrip()):
            self._begun = True
            self._holds |= beginning[0] in "{["  # JSON at the beginning is a call too
        if self._holds:
            return ""
        text, self._holds = self._stops.push(piece)
        self.given += text
        return text

    def finish(self, answer: Answer) -> str:
        """The rest: all that was held back, unless it was calls."""
        if answer.tool_calls:
            return ""
        rest = answer.text[len(self.given) :]
        self.given += rest
        return rest


def text_before_calls(form: ToolFormat | None, answer: Answer) -> str:
    """Of a whole answer with calls, the text before them."""
    if not answer.tool_calls:
        return answer.text
    before = TextBeforeCalls(form, has_tools=True, is_forced=False)
    return before.push(answer.text).rstrip()


def finish_reason(answer: Answer, *, blocked: bool) -> str:
    """In OpenAI's words. An answer that came to repeat itself was cut off, so it is `length` like the others that were;
    the field `edgephi_finish` tells them apart."""
    if blocked:
        return "content_filter"
    if answer.tool_calls:
        return "tool_calls"
    return "stop" if answer.finish == "stop" else "length"


def call_arguments(call: ToolCall) -> str:
    """As a JSON text."""
    return as_json(dict(call.arguments))


def call_of(key: str, name: str, arguments: str | Mapping[str, object]) -> dict[str, object]:
    """A call as a message of chat completions has it."""
    written = arguments if isinstance(arguments, str) else as_json(arguments)
    return {"id": key, "type": "function", "function": {"name": name, "arguments": written}}


def told_of(answer: Answer, *, blocked: bool) -> dict[str, Any]:
    """What edgephi tells beside the usual fields."""
    timings = {
        "time_to_first_token_s": answer.time_to_first_token_s,
        "decode_tokens_per_s": answer.decode_tokens_per_s,
        "total_s": answer.total_s,
        "provider": answer.provider,
    }
    return {"timings": timings, "edgephi_finish": "content_filter" if blocked else answer.finish}


def logprob_entries(
    tokenizer: Tokenizer, stop_ids: frozenset[int], tokens: Sequence[TokenLogprobs]
) -> list[dict[str, object]]:
    """As chat completions and responses show them; stop tokens are no part of an answer."""

    def entry(token: int, logprob: float) -> dict[str, object]:
        text = tokenizer.decode([token], special=True)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    return [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]}
        for one in tokens
        if one.token not in stop_ids
    ]
