"""OpenAI's responses: `POST /v1/responses`, and what it remembers: `GET` and `DELETE /v1/responses/{id}`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgephi.runtime.answer import Answer
from edgephi.runtime.sampling import TokenLogprobs
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
from edgephi.runtime.server.openai_chat import Function, FunctionName
from edgephi.runtime.server.parameters import (
    ObjectFormat,
    ResponseSchema,
    SamplingParameters,
    Strict,
    TextFormat,
    TopLogprobs,
    as_given,
    parse,
)
from edgephi.runtime.server.service import Answering, Service, finish


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
class _Asked:
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


def _read(request: ResponsesRequest, service: Service) -> _Asked:
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
    return _Asked(request, name, before, new, conversation, _head(request))


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


def _usage(answer: Answer) -> dict[str, object]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.reused_tokens},
        "output_tokens": answer.new_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
    }


def _empty(asked: _Asked, status: str) -> dict[str, object]:
    return {**asked.head, "status": status, "error": None, "incomplete_details": None, "output": [], "usage": None}


def _part(text: str, logprobs: Sequence[dict[str, object]]) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _message(key: str, text: str, logprobs: Sequence[dict[str, object]], status: str) -> dict[str, object]:
    parts = [_part(text, logprobs)]
    return {"id": key, "type": "message", "role": "assistant", "status": status, "content": parts}


def _call_items(answer: Answer) -> list[dict[str, object]]:
    return [
        {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": call_arguments(call),
            "status": "completed",
        }
        for call in answer.tool_calls
    ]


def _status(answering: Answering, answer: Answer) -> str:
    return "completed" if answer.finish == "stop" and not answering.is_blocked else "incomplete"


def _done(
    asked: _Asked, answering: Answering, answer: Answer, output: Sequence[dict[str, object]]
) -> dict[str, object]:
    status, blocked = _status(answering, answer), answering.is_blocked
    reason = "content_filter" if blocked else "max_output_tokens"
    return {
        **asked.head,
        "status": status,
        "error": None,
        "incomplete_details": None if status == "completed" else {"reason": reason},
        "output": list(output),
        "usage": _usage(answer),
        **told_of(answer, blocked=blocked),
    }


def _keep(service: Service, asked: _Asked, response: dict[str, object], text: str, answer: Answer) -> None:
    """Remember a response and its conversation, if that was asked for."""
    if not asked.request.store:
        return
    said: dict[str, object] = {"role": "assistant", "content": text}
    if answer.tool_calls:
        said["tool_calls"] = [call_of(call.id, call.name, call.arguments) for call in answer.tool_calls]
    service.store.put(str(response["id"]), response, asked.before, [*asked.new, said])


async def create(request: Request) -> Response:
    """Answer, and remember the conversation."""
    service: Service = request.app.state.service
    body = await read_json(request.receive, request.headers, service.settings)
    asked = _read(parse(ResponsesRequest, body), service)
    conversation = asked.conversation
    answering = await service.answer(request.receive, asked.model, conversation.ask, conversation.messages, "input")
    if asked.request.stream:
        return sse.EventStream(_Events(service, asked, answering).all(), answering.cancel)
    answer = await finish(request.receive, answering)
    text = text_before_calls(answering.tool_format, answer)
    status = _status(answering, answer)
    logprobs = answering.logprobs(answer.logprobs)
    output = [_message(f"msg_{uuid.uuid4().hex}", text, logprobs, status)] if text or not answer.tool_calls else []
    response = _done(asked, answering, answer, [*output, *_call_items(answer)])
    _keep(service, asked, response, text, answer)
    return JSONResponse(response)


async def retrieve(request: Request) -> Response:
    """A response that is remembered."""
    service: Service = request.app.state.service
    return JSONResponse(service.store.get(request.path_params["response_id"]).response)


async def delete(request: Request) -> Response:
    """Forget a response."""
    service: Service = request.app.state.service
    key = request.path_params["response_id"]
    service.store.delete(key)
    return JSONResponse({"id": key, "object": "response", "deleted": True})


class _Events:
    """The events of one response, numbered.

    Args:
        service: remembers the response.
        asked: the request.
        answering: its answer.
    """

    def __init__(self, service: Service, asked: _Asked, answering: Answering) -> None:
        self._service, self._asked, self._answering = service, asked, answering
        self._number = -1
        self._key = f"msg_{uuid.uuid4().hex}"
        self._is_open = False
        self._logprobs: list[dict[str, object]] = []

    def _event(self, kind: str, **more: object) -> bytes:
        self._number += 1
        return sse.event({"type": kind, "sequence_number": self._number, **more}, kind)

    def _of_text(self, kind: str, **more: object) -> bytes:
        return self._event(f"response.{kind}", item_id=self._key, output_index=0, content_index=0, **more)

    async def all(self) -> AsyncGenerator[bytes, None]:
        """Encoded events; an error is one too."""
        asked, answering = self._asked, self._answering
        conversation = asked.conversation
        before = TextBeforeCalls(
            answering.tool_format, has_tools=conversation.has_tools, is_forced=conversation.must_call
        )
        try:
            yield self._event("response.created", response=_empty(asked, "in_progress"))
            yield self._event("response.in_progress", response=_empty(asked, "in_progress"))
            async for piece in answering:
                for event in self._text(before.push(piece.text), piece.logprobs):
                    yield event
            answer = answering.answer
            for event in self._text(before.finish(answer), ()):
                yield event
            status = _status(answering, answer)
            output: list[dict[str, object]] = []
            if self._is_open or not answer.tool_calls:
                for event in self._open():
                    yield event
                output.append(_message(self._key, before.given, self._logprobs, status))
                yield self._of_text("output_text.done", text=before.given, logprobs=self._logprobs)
                yield self._of_text("content_part.done", part=_part(before.given, self._logprobs))
                yield self._event("response.output_item.done", output_index=0, item=output[0])
            for item in _call_items(answer):
                place = {"output_index": len(output), "item_id": item["id"]}
                begun = {**item, "arguments": "", "status": "in_progress"}
                yield self._event("response.output_item.added", output_index=len(output), item=begun)
                yield self._event("response.function_call_arguments.delta", **place, delta=item["arguments"])
                arguments = {"arguments": item["arguments"], "name": item["name"]}
                yield self._event("response.function_call_arguments.done", **place, **arguments)
                yield self._event("response.output_item.done", output_index=len(output), item=item)
                output.append(item)
            response = _done(asked, answering, answer, output)
            _keep(self._service, asked, response, before.given, answer)
            yield self._event(f"response.{status}", response=response)
        except Exception as error:
            told = fault(error)
            yield self._event("error", code=told.code, message=told.message, param=told.param)
            failed = {**_empty(asked, "failed"), "error": {"code": "server_error", "message": told.message}}
            yield self._event("response.failed", response=failed)

    def _open(self) -> list[bytes]:
        if self._is_open:
            return []
        self._is_open = True
        item = {**_message(self._key, "", (), "in_progress"), "content": []}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._of_text("content_part.added", part=_part("", ())),
        ]

    def _text(self, text: str, tokens: Sequence[TokenLogprobs]) -> list[bytes]:
        entries = self._answering.logprobs(tokens)
        self._logprobs += entries
        if not text:
            return []
        return [*self._open(), self._of_text("output_text.delta", delta=text, logprobs=entries)]
