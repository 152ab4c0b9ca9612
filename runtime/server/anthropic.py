"""Anthropic's messages: `POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgephi.runtime.answer import Answer
from edgephi.runtime.server import sse
from edgephi.runtime.server.conversation import (
    Conversation,
    Message,
    TextBeforeCalls,
    call_arguments,
    call_of,
    read_conversation,
    text_before_calls,
    told_of,
)
from edgephi.runtime.server.errors import fault
from edgephi.runtime.server.limits import read_json
from edgephi.runtime.server.parameters import Stops, Strict, Temperature, parse
from edgephi.runtime.server.service import Answering, Service, finish


class CacheControl(Strict):
    """Asks for what happens anyway: prompts that begin alike share their keys and values."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ToolUseBlock(Strict):
    """A call that an assistant's message has."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Strict):
    """What a tool gave back."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False
    cache_control: CacheControl | None = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class AnthropicMessage(Strict):
    """A turn."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(Strict):
    """A tool that the model may call."""

    name: str = Field(min_length=1)
    description: str = ""
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"
    cache_control: CacheControl | None = None


class ToolChoice(Strict):
    """Whether it may or has to."""

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Disabled(Strict):
    """Of `thinking`."""

    type: Literal["disabled"]


class Metadata(Strict):
    """A label of the caller's own, which changes no answer."""

    user_id: str | None = None


class CountRequest(Strict):
    """A request of `/v1/messages/count_tokens`."""

    model: str
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Disabled | None = None


class MessagesRequest(CountRequest):
    """A request of `/v1/messages`."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: Stops | None = None
    temperature: Temperature | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    service_tier: Literal["auto", "standard_only"] = "auto"
    metadata: Metadata | None = None


def _text(content: str | Sequence[object] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.text for block in content if isinstance(block, TextBlock))


def read_messages(request: CountRequest) -> list[Message]:
    """Messages of chat completions: results of tools become turns of their own."""
    made: list[Message] = [{"role": "system", "content": _text(request.system)}] if request.system else []
    for message in request.messages:
        blocks = [] if isinstance(message.content, str) else message.content
        made += [
            {"role": "tool", "content": _text(block.content), "tool_call_id": block.tool_use_id}
            for block in blocks
            if isinstance(block, ToolResultBlock)
        ]
        calls = [call_of(block.id, block.name, block.input) for block in blocks if isinstance(block, ToolUseBlock)]
        if calls:
            made.append({"role": message.role, "content": _text(message.content), "tool_calls": calls})
        elif not blocks or any(isinstance(block, TextBlock) for block in blocks):
            made.append({"role": message.role, "content": _text(message.content)})
    return made


_NAMES = {"stop": "stop_sequences"}
"""What parameters of chat completions are called here."""


def read_request(request: CountRequest, service: Service) -> Conversation:
    """What a request asks.

    Raises:
        RequestError: what goes together does not, or more tokens than the server allows.
    """
    asked: dict[str, object] = {"messages": read_messages(request)}
    if isinstance(request, MessagesRequest):
        asked |= {"max_tokens": request.max_tokens, "temperature": request.temperature}
        asked |= {"top_p": request.top_p, "top_k": request.top_k, "stop": request.stop_sequences or None}
    if request.tools:
        asked["tools"] = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
            }
            for tool in request.tools
        ]
    choice = request.tool_choice
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        asked["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
        asked["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return read_conversation(asked, service.settings, _NAMES)


def _usage(answer: Answer) -> dict[str, object]:
    return {
        "input_tokens": answer.prompt_tokens - answer.reused_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.reused_tokens,
        "output_tokens": answer.new_tokens,
    }


def _stop(answering: Answering, answer: Answer, conversation: Conversation) -> dict[str, object]:
    if answering.is_blocked:
        return {"stop_reason": "refusal", "stop_sequence": None}
    if answer.tool_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if answer.finish != "stop":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    text = answering.stop_text(answer, conversation.stops)
    return {"stop_reason": "end_turn" if text is None else "stop_sequence", "stop_sequence": text}


async def messages(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    asked = parse(MessagesRequest, await read_json(request.receive, request.headers, service.settings))
    name, conversation = service.choose(asked.model, read_request(asked, service))
    answering = await service.answer(request.receive, name, conversation.ask, conversation.messages)
    head: dict[str, object] = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
    head["model"] = asked.model
    if asked.stream:
        return sse.EventStream(_events(answering, conversation, head), answering.cancel)
    answer = await finish(request.receive, answering)
    text = text_before_calls(answering.tool_format, answer)
    content: list[dict[str, object]] = [{"type": "text", "text": text}] if text else []
    content += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": dict(call.arguments)}
        for call in answer.tool_calls
    ]
    told = told_of(answer, blocked=answering.is_blocked)
    stopped = _stop(answering, answer, conversation)
    return JSONResponse({**head, "content": content, **stopped, "usage": _usage(answer), **told})


async def _events(
    answering: Answering, conversation: Conversation, head: dict[str, object]
) -> AsyncGenerator[bytes, None]:
    before = TextBeforeCalls(answering.tool_format, has_tools=conversation.has_tools, is_forced=conversation.must_call)
    index, is_open = 0, False

    def event(kind: str, **more: object) -> bytes:
        return sse.event({"type": kind, **more}, kind)

    def delta(**what: object) -> bytes:
        return event("content_block_delta", index=index, delta=what)

    try:
        empty = {"input_tokens": answering.prompt_tokens, "output_tokens": 0}
        begun = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": empty}
        yield event("message_start", message=begun)
        async for piece in answering:
            if text := before.push(piece.text):
                if not is_open:
                    is_open = True
                    yield event("content_block_start", index=index, content_block={"type": "text", "text": ""})
                yield delta(type="text_delta", text=text)
        answer = answering.answer
        if rest := before.finish(answer):
            if not is_open:
                is_open = True
                yield event("content_block_start", index=index, content_block={"type": "text", "text": ""})
            yield delta(type="text_delta", text=rest)
        if is_open:
            yield event("content_block_stop", index=index)
            index += 1
        for call in answer.tool_calls:
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            yield event("content_block_start", index=index, content_block=block)
            yield delta(type="input_json_delta", partial_json=call_arguments(call))
            yield event("content_block_stop", index=index)
            index += 1
        stopped = _stop(answering, answer, conversation)
        yield event(
            "message_delta", delta=stopped, usage=_usage(answer), **told_of(answer, blocked=answering.is_blocked)
        )
        yield event("message_stop")
    except Exception as error:
        yield sse.event(fault(error).anthropic(), "error")


async def count_tokens(request: Request) -> Response:
    """Tokens of a conversation, computed as the model reads it."""
    service: Service = request.app.state.service
    asked = parse(CountRequest, await read_json(request.receive, request.headers, service.settings))
    name, conversation = service.choose(asked.model, read_request(asked, service))
    messages, tools = conversation.messages, conversation.arguments.get("tools")
    count = await service.with_model(request.receive, name, lambda model: model.count_tokens(messages, tools=tools))
    return JSONResponse({"input_tokens": count})
