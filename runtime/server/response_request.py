"""A request of `POST /v1/responses`: what it may say, and the conversation it asks to have answered."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from edgephi.runtime.server.conversation import Conversation, Message, call_of, read_conversation
from edgephi.runtime.server.openai_chat import Function, FunctionName
from edgephi.runtime.server.parameters import (
    ObjectFormat,
    ResponseSchema,
    SamplingParameters,
    Strict,
    TextFormat,
    TopLogprobs,
    as_given,
)
from edgephi.runtime.server.service import Service


class InputText(Strict):
    """Text of a message; what a response gave out may come back as it was."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None
    """What a client's own parser made of the text; the text counts."""


class InputMessage(Strict):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None


class InputCall(Strict):
    """A call that the model asked for."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    parsed_arguments: Any = None


class InputResult(Strict):
    """What a tool gave back."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


def _kind(item: object) -> object:
    """Of an item: a message need not say that it is one."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")],
    Discriminator(_kind),
]


class ResponseTool(Function):
    """A tool."""

    type: Literal["function"]


class NamedResponseTool(FunctionName):
    """The tool that has to be called."""

    type: Literal["function"]


class FlatSchemaFormat(ResponseSchema):
    """The answer is JSON of a schema."""

    type: Literal["json_schema"]


class TextOptions(Strict):
    """What the answer has to be."""

    format: Annotated[FlatSchemaFormat | ObjectFormat | TextFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(SamplingParameters):
    """A request of `/v1/responses`."""

    model: str
    input: str | list[InputItem] = Field(min_length=1)
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    stream: bool = False
    store: bool = True
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16
    )
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    top_logprobs: TopLogprobs | None = None
    tools: list[ResponseTool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    # values that ask for what happens anyway
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    service_tier: Literal["auto", "default"] = "auto"


@dataclass(frozen=True)
class AskedResponse:
    """A request, read."""

    request: ResponsesRequest
    model: str
    before: Sequence[Message]
    """The conversation that it goes on with."""
    new: Sequence[Message]
    conversation: Conversation
    head: dict[str, object]
    """What every state of the response has."""


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def read_input(given: str | Sequence[InputMessage | InputCall | InputResult]) -> list[Message]:
    """Messages of chat completions: calls in a row are one message, with the text before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    made: list[Message] = []
    for item in given:
        if isinstance(item, InputMessage):
            made.append({"role": item.role, "content": _text(item.content)})
        elif isinstance(item, InputResult):
            made.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
        else:
            last = made[-1] if made and made[-1]["role"] == "assistant" else None
            calls = last.get("tool_calls", []) if last else []
            assert isinstance(calls, list)
            said = {"role": "assistant", "content": last["content"] if last else ""}
            call = call_of(item.call_id, item.name, item.arguments)
            made = [*(made[:-1] if last else made), {**said, "tool_calls": [*calls, call]}]
    return made


_NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
"""What parameters of chat completions are called here."""
_OWN = (
    *("input", "instructions", "previous_response_id", "max_output_tokens", "store", "metadata", "include", "text"),
    *("tools", "tool_choice", "background", "truncation", "top_logprobs"),
)
"""Parameters that chat completions do not have, or have in another shape."""


def read_request(request: ResponsesRequest, service: Service) -> AskedResponse:
    """What is asked of which model; errors are those of `read_conversation`, `Service.choose` and the store."""
    before: Sequence[Message] = ()
    if request.previous_response_id is not None:
        before = service.store.get(request.previous_response_id, "previous_response_id").messages
    new = read_input(request.input)
    system: list[Message] = [{"role": "system", "content": request.instructions}] if request.instructions else []
    asked: dict[str, object] = {**as_given(request, *_OWN), "messages": [*system, *before, *new]}
    if request.max_output_tokens is not None:
        asked["max_completion_tokens"] = request.max_output_tokens
    if request.include or request.top_logprobs is not None:
        asked |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.tools:
        asked["tools"] = [{"type": "function", "function": as_given(tool, "type")} for tool in request.tools]
    choice = request.tool_choice
    named = choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
    asked["tool_choice"] = named
    form = request.text.format if request.text else None
    if isinstance(form, FlatSchemaFormat):
        asked["response_format"] = {"type": "json_schema", "json_schema": as_given(form, "type")}
    elif form is not None:
        asked["response_format"] = {"type": form.type}
    conversation = read_conversation(asked, service.settings, _NAMES)
    name, conversation = service.choose(request.model, conversation)
    return AskedResponse(request, name, before, new, conversation, _head(request))


def _head(request: ResponsesRequest) -> dict[str, object]:
    given = request.model_dump(
        mode="json", by_alias=True, exclude={"input", "stream", "include", "stop", "logit_bias", "adapter"}
    )
    form = given.pop("text", None) or {}
    shown = {key: value for key, value in given.items() if value is not None or key in _SHOWN_AS_NULL}
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        **shown,
        "text": {"format": form.get("format") or {"type": "text"}},
    }


_SHOWN_AS_NULL = frozenset({"instructions", "previous_response_id", "max_output_tokens", "temperature", "top_p"})
