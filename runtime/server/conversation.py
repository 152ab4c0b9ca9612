"""Conversations in the shape that all interfaces are turned into, and as a model's template takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgephi.runtime.answer import Answer, Stream
from edgephi.runtime.endings import StopTexts
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import SamplingOptions, TokenLogprobs
from edgephi.runtime.server.errors import RequestError
from edgephi.runtime.tokenizer import Tokenizer
from edgephi.runtime.tool_formats import ToolFormat
from edgephi.runtime.tools import ToolCall, as_json

Message = Mapping[str, object]
"""`role` and `content`; `tool_calls` (name, arguments and id) of an assistant; `tool_call_id` of a tool's result."""


@dataclass(frozen=True)
class Conversation:
    """What a model is asked."""

    messages: Sequence[Message]
    sampling: SamplingOptions
    tools: Sequence[Mapping[str, object]] = ()
    """Descriptions; empty where the model may not call any."""
    tool_choice: str = "auto"
    response_format: Mapping[str, object] | None = None

    def ask(self, model: Model) -> Stream:
        """A stream; the errors are those of `Model.chat`."""
        return model.chat(
            for_template(self.messages, model.tool_format),
            tools=self.tools or None,
            tool_choice=self.tool_choice,
            response_format=self.response_format,
            **self.sampling,
        )


def for_template(messages: Sequence[Message], form: ToolFormat | None) -> list[Message]:
    """Calls and results of tools as the model's template takes them."""
    names: dict[object, object] = {}
    made: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            names |= {call["id"]: call["name"] for call in calls}
            made.append(_calling(message, calls, form))
        elif message["role"] != "tool":
            made.append(message)
        elif form is not None and form.in_message:
            made.append({"role": "tool_response", "content": message["content"]})
        else:
            named = {"name": name} if (name := names.get(message.get("tool_call_id"))) else {}
            made.append({**message, **named})
    return made


def _calling(message: Message, calls: Sequence[Mapping[str, object]], form: ToolFormat | None) -> Message:
    if form is not None and form.in_message:
        flat = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        text = f"{message.get('content') or ''}{form.openers[0]}{as_json(flat)}{form.closers[0]}"
        return {"role": "assistant", "content": text}
    given = [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in calls
    ]
    return {"role": "assistant", "content": message.get("content") or "", "tool_calls": given}


def arguments_of(text: str, param: str) -> dict[str, object]:
    """Arguments that stand in a request as a JSON text.

    Raises:
        RequestError: they are no JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError(
            f"{param} is no JSON object", remedy="Send the arguments as the model wrote them", param=param
        )
    return value


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


def finish_reason(answer: Answer) -> str:
    """In OpenAI's words. An answer that came to repeat itself was cut off, so it is `length` like the others that were;
    the field `edgephi_finish` tells them apart."""
    if answer.tool_calls:
        return "tool_calls"
    return "stop" if answer.finish == "stop" else "length"


def call_arguments(call: ToolCall) -> str:
    """As a JSON text."""
    return as_json(dict(call.arguments))


def timings(answer: Answer) -> dict[str, object]:
    """Seconds, and tokens a second."""
    return {
        "time_to_first_token_s": answer.time_to_first_token_s,
        "decode_tokens_per_s": answer.decode_tokens_per_s,
        "total_s": answer.total_s,
        "provider": answer.provider,
    }


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
