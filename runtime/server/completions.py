"""OpenAI's older completions, `POST /v1/completions`: a text is continued as it is, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgephi.runtime.model import Model
from edgephi.runtime.sampling import TokenLogprobs
from edgephi.runtime.server import sse
from edgephi.runtime.server.conversation import finish_reason, sampling_arguments, told_of
from edgephi.runtime.server.errors import fault
from edgephi.runtime.server.limits import read_json
from edgephi.runtime.server.openai_chat import StreamOptions, usage
from edgephi.runtime.server.parameters import ResponseFormat, SamplingParameters, as_given, parse
from edgephi.runtime.server.service import Answering, Service, finish
from edgephi.runtime.stream import Stream


class CompletionRequest(SamplingParameters):
    """A request of `/v1/completions`."""

    model: str
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)
    response_format: ResponseFormat | None = None
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False


def _logprobs(answering: Answering, tokens: Sequence[TokenLogprobs], start: int) -> dict[str, object]:
    """In the older shape: lists side by side."""
    texts = [answering.text_of(one.token) for one in tokens]
    offsets = [start]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [{answering.text_of(token): value for token, value in one.top} for one in tokens],
        "text_offset": offsets[:-1],
    }


async def completions(request: Request) -> Response:
    """Continue a text."""
    service: Service = request.app.state.service
    asked = parse(CompletionRequest, await read_json(request.receive, request.headers, service.settings))
    arguments = sampling_arguments(as_given(asked, "prompt", "logprobs", "best_of", "echo"), service.settings)
    if asked.logprobs is not None:
        arguments["logprobs"] = asked.logprobs
    prompt = asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0]
    name, arguments = service.with_adapter(asked.model, arguments)

    def ask(model: Model) -> Stream:
        return model.generate(prompt, **arguments)

    answering = await service.answer(request.receive, name, ask, prompt, "prompt")
    head: dict[str, object] = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
    head |= {"created": int(time.time()), "model": asked.model}
    if asked.stream:
        return sse.EventStream(_chunks(answering, asked, head), answering.cancel)
    answer = await finish(request.receive, answering)
    shown = None if asked.logprobs is None else _logprobs(answering, answer.logprobs, 0)
    reason = finish_reason(answer, blocked=answering.is_blocked)
    choice = {"index": 0, "text": answer.text, "finish_reason": reason, "logprobs": shown}
    told = told_of(answer, blocked=answering.is_blocked)
    return JSONResponse({**head, "choices": [choice], "usage": usage(answer), **told})


async def _chunks(
    answering: Answering, asked: CompletionRequest, head: dict[str, object]
) -> AsyncGenerator[bytes, None]:
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    given = 0

    def chunk(text: str, reason: str | None, tokens: Sequence[TokenLogprobs] = (), **more: object) -> bytes:
        shown = None if asked.logprobs is None else _logprobs(answering, tokens, given)
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": shown}
        empty = {"usage": None} if with_usage else {}
        return sse.event({**head, "choices": [choice], **empty, **more})

    try:
        async for piece in answering:
            if piece.text or (asked.logprobs is not None and piece.logprobs):
                yield chunk(piece.text, None, piece.logprobs)
                given += len(piece.text)
        answer = answering.answer
        told = told_of(answer, blocked=answering.is_blocked)
        yield chunk("", finish_reason(answer, blocked=answering.is_blocked), **told)
        if with_usage:
            yield sse.event({**head, "choices": [], "usage": usage(answer), "timings": told["timings"]})
        yield sse.DONE
    except Exception as error:
        yield sse.event(fault(error).openai(), "error")
