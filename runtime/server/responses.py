"""OpenAI's responses: `POST /v1/responses`, and what it remembers: `GET` and `DELETE /v1/responses/{id}`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgephi.runtime.answer import Answer
from edgephi.runtime.sampling import TokenLogprobs
from edgephi.runtime.server import sse
from edgephi.runtime.server.conversation import TextBeforeCalls, call_arguments, call_of, text_before_calls, told_of
from edgephi.runtime.server.errors import fault
from edgephi.runtime.server.limits import read_json
from edgephi.runtime.server.parameters import parse
from edgephi.runtime.server.response_request import AskedResponse, ResponsesRequest, read_request
from edgephi.runtime.server.service import Answering, Service, finish


def _usage(answer: Answer) -> dict[str, object]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.reused_tokens},
        "output_tokens": answer.new_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
    }


def _empty(asked: AskedResponse, status: str) -> dict[str, object]:
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
    asked: AskedResponse, answering: Answering, answer: Answer, output: Sequence[dict[str, object]]
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


def _keep(service: Service, asked: AskedResponse, response: dict[str, object], text: str, answer: Answer) -> None:
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
    asked = read_request(parse(ResponsesRequest, body), service)
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

    def __init__(self, service: Service, asked: AskedResponse, answering: Answering) -> None:
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
