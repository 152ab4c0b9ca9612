"""OpenAI's chat completions: `POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgephi.runtime.answer import Answer
from edgephi.runtime.sampling import TokenLogprobs
from edgephi.runtime.server import sse
from edgephi.runtime.server.conversation import (
    Conversation,
    TextBeforeCalls,
    call_arguments,
    finish_reason,
    read_conversation,
    text_before_calls,
    told_of,
)
from edgephi.runtime.server.errors import fault
from edgephi.runtime.server.limits import read_json
from edgephi.runtime.server.parameters import ResponseFormat, SamplingParameters, Strict, TopLogprobs
from edgephi.runtime.server.service import Answering, Service, finish


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A call that an assistant's message has."""

    name: str
    arguments: str
    parsed_arguments: Any = None
    """What a client's own parser made of them; the text counts."""


class CallPart(Strict):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


Content = str | list[TextPart]


class SystemMessage(Strict):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    """What a person says."""

    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    """What the model said."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[CallPart] | None = None
    parsed: Any = None
    """What a client's own parser made of the text; the text counts."""
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Strict):
    """What a tool gave back."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(min_length=1)
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class FunctionTool(Strict):
    """A tool."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Of a tool that has to be called."""

    name: str


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class Allowed(Strict):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedTools(Strict):
    """The tools that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


class StreamOptions(Strict):
    """What a stream tells."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(SamplingParameters):
    """A request of `/v1/chat/completions`, as the OpenAPI document shows it; `read_conversation` reads it."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    tools: list[FunctionTool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    # values that ask for what happens anyway
    n: Literal[1] = 1
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    # labels of the caller's own, which change no answer
    user: str | None = None
    prompt_cache_key: str | None = None


def usage(answer: Answer) -> dict[str, object]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    asked = await read_json(request.receive, request.headers, service.settings)
    conversation = read_conversation(asked, service.settings)
    name, conversation = service.choose(asked.get("model"), conversation)
    answering = await service.answer(request.receive, name, conversation.ask, conversation.messages)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked["model"]}
    with_logprobs = "logprobs" in conversation.arguments
    if asked.get("stream"):
        options = asked.get("stream_options")
        with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return sse.EventStream(_chunks(answering, conversation, head, with_logprobs, with_usage), answering.cancel)
    answer = await finish(request.receive, answering)
    message: dict[str, object] = {"role": "assistant", "content": text_before_calls(answering.tool_format, answer)}
    if answer.tool_calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = _calls(answer)
    choice = {
        "index": 0,
        "message": {**message, "refusal": None},
        "finish_reason": finish_reason(answer, blocked=answering.is_blocked),
        "logprobs": {"content": answering.logprobs(answer.logprobs), "refusal": None} if with_logprobs else None,
    }
    told = told_of(answer, blocked=answering.is_blocked)
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage(answer), **told})


def _calls(answer: Answer) -> list[dict[str, object]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call_arguments(call)}}
        for call in answer.tool_calls
    ]


async def _chunks(
    answering: Answering, conversation: Conversation, head: dict[str, object], with_logprobs: bool, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    before = TextBeforeCalls(answering.tool_format, has_tools=conversation.has_tools, is_forced=conversation.must_call)

    def chunk(delta: dict[str, object], tokens: Sequence[TokenLogprobs] = (), **more: object) -> bytes:
        entries = {"content": answering.logprobs(tokens), "refusal": None} if with_logprobs else None
        choice = {"index": 0, "delta": delta, "finish_reason": more.pop("finish", None), "logprobs": entries}
        empty = {"usage": None} if with_usage else {}
        return sse.event({**head, "object": "chat.completion.chunk", "choices": [choice], **empty, **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in answering:
            text = before.push(piece.text)
            if text or (with_logprobs and piece.logprobs):
                yield chunk({"content": text}, piece.logprobs)
        answer = answering.answer
        if rest := before.finish(answer):
            yield chunk({"content": rest})
        for index, call in enumerate(_calls(answer)):
            function = call["function"]
            assert isinstance(function, dict)
            opening = {**call, "function": {"name": function["name"], "arguments": ""}}
            yield chunk({"tool_calls": [{"index": index, **opening}]})
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": function["arguments"]}}]})
        told = told_of(answer, blocked=answering.is_blocked)
        yield chunk({}, finish=finish_reason(answer, blocked=answering.is_blocked), **told)
        if with_usage:
            last = {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)}
            yield sse.event({**last, "timings": told["timings"]})
        yield sse.DONE
    except Exception as error:
        yield sse.event(fault(error).openai(), "error")
