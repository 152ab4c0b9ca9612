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
    Message,
    TextBeforeCalls,
    arguments_of,
    call_arguments,
    finish_reason,
    text_before_calls,
    timings,
)
from edgephi.runtime.server.errors import RequestError, fault
from edgephi.runtime.server.limits import read_json
from edgephi.runtime.server.parameters import (
    ResponseFormat,
    SamplingParameters,
    Strict,
    TopLogprobs,
    parse,
    response_format,
    sampling_options,
)
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

    name: str = Field(min_length=1, max_length=128)
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


class StreamOptions(Strict):
    """What a stream tells."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(SamplingParameters):
    """A request of `/v1/chat/completions`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    tools: list[FunctionTool] = Field(default_factory=list, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    response_format: ResponseFormat | None = None
    # values that ask for what happens anyway
    n: Literal[1] = 1
    store: Literal[False] = False
    parallel_tool_calls: Literal[True] = True
    service_tier: Literal["auto", "default"] = "auto"
    modalities: list[Literal["text"]] | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    # labels of the caller's own, which change no answer
    user: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)


def text_of(content: Content | None) -> str:
    """A message's text; parts stand on lines of their own."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def read_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages as `Conversation` has them."""
    made: list[Message] = []
    for place, message in enumerate(messages):
        read: dict[str, object] = {
            "role": "system" if isinstance(message, SystemMessage) else message.role,
            "content": text_of(message.content),
        }
        if isinstance(message, AssistantMessage) and message.tool_calls:
            param = f"messages.{place}.tool_calls.{{}}.function.arguments"
            read["tool_calls"] = [
                {
                    "id": call.id,
                    "name": call.function.name,
                    "arguments": arguments_of(call.function.arguments, param.format(number)),
                }
                for number, call in enumerate(message.tool_calls)
            ]
        if isinstance(message, ToolMessage):
            read["tool_call_id"] = message.tool_call_id
        made.append(read)
    return made


def read_conversation(request: ChatRequest, service: Service) -> Conversation:
    """What a request asks.

    Raises:
        RequestError: parameters that do not go together.
    """
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestError(
            "max_tokens and max_completion_tokens are two names of one parameter",
            remedy="Give one of them",
            param="max_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is for streams", remedy="Set stream to true", param="stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs", remedy="Set logprobs to true", param="top_logprobs")
    by_name = request.max_completion_tokens is not None
    sampling = sampling_options(
        request,
        service.settings,
        request.max_completion_tokens if by_name else request.max_tokens,
        "max_completion_tokens" if by_name else "max_tokens",
    )
    if request.logprobs:
        sampling["logprobs"] = request.top_logprobs or 0
    choice = request.tool_choice if isinstance(request.tool_choice, str) else request.tool_choice.function.name
    may_call = choice != "none"
    tools = [tool.function.model_dump(exclude={"strict"}) for tool in request.tools] if may_call else []
    return Conversation(
        read_messages(request.messages),
        sampling,
        [{"type": "function", "function": tool} for tool in tools],
        choice if may_call else "auto",
        response_format(request.response_format),
    )


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
    asked = parse(ChatRequest, await read_json(request.receive, request.headers, service.settings))
    conversation = read_conversation(asked, service)
    answering = await service.answer(request.receive, asked.model, conversation.ask)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    if asked.stream:
        return sse.EventStream(_chunks(answering, asked, conversation, head))
    answer = await finish(request.receive, answering)
    message: dict[str, object] = {"role": "assistant", "content": text_before_calls(answering.tool_format, answer)}
    if answer.tool_calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = _calls(answer)
    choice = {
        "index": 0,
        "message": {**message, "refusal": None},
        "finish_reason": finish_reason(answer),
        "logprobs": {"content": answering.logprobs(answer.logprobs), "refusal": None} if asked.logprobs else None,
    }
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(answer),
            "timings": timings(answer),
            "edgephi_finish": answer.finish,
        }
    )


def _calls(answer: Answer) -> list[dict[str, object]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call_arguments(call)}}
        for call in answer.tool_calls
    ]


async def _chunks(
    answering: Answering, asked: ChatRequest, conversation: Conversation, head: dict[str, object]
) -> AsyncGenerator[bytes, None]:
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    before = TextBeforeCalls(
        answering.tool_format, has_tools=bool(conversation.tools), is_forced=conversation.tool_choice != "auto"
    )

    def chunk(delta: dict[str, object], tokens: Sequence[TokenLogprobs] = (), **more: object) -> bytes:
        entries = {"content": answering.logprobs(tokens), "refusal": None} if asked.logprobs else None
        choice = {"index": 0, "delta": delta, "finish_reason": more.pop("finish", None), "logprobs": entries}
        empty = {"usage": None} if with_usage else {}
        return sse.event({**head, "object": "chat.completion.chunk", "choices": [choice], **empty, **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in answering:
            text = before.push(piece.text)
            if text or (asked.logprobs and piece.logprobs):
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
        yield chunk({}, finish=finish_reason(answer), timings=timings(answer), edgephi_finish=answer.finish)
        if with_usage:
            last = {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)}
            yield sse.event({**last, "timings": timings(answer)})
        yield sse.DONE
    except Exception as error:
        yield sse.event(fault(error).openai(), "error")
    finally:
        answering.cancel()
