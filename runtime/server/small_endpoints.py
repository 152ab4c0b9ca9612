"""Endpoints without an answer: models, tokens, health, metrics, and embeddings, which are refused."""

from __future__ import annotations

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgephi.runtime.placement.place import Place
from edgephi.runtime.server.conversation import read_conversation
from edgephi.runtime.server.errors import RequestError
from edgephi.runtime.server.limits import has_key, read_json
from edgephi.runtime.server.metrics import CONTENT_TYPE
from edgephi.runtime.server.models import Entry
from edgephi.runtime.server.openai_chat import ChatMessage, FunctionTool
from edgephi.runtime.server.parameters import Strict, as_given, parse
from edgephi.runtime.server.service import Service


class TokenizeRequest(Strict):
    """A request of `/tokenize`: a text as it is, or a conversation as the model reads it."""

    model: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    tools: list[FunctionTool] = Field(default_factory=list)


class DetokenizeRequest(Strict):
    """A request of `/detokenize`."""

    model: str
    tokens: list[int] = Field(max_length=200_000)


async def models(request: Request) -> Response:
    """All models, in memory or not; none is loaded for it."""
    service: Service = request.app.state.service
    entries = service.pool.entries.values()
    names = [(entry, adapter) for entry in entries for adapter in (None, *entry.adapters)]
    return JSONResponse({"object": "list", "data": [_listed(entry, adapter) for entry, adapter in names]})


async def model(request: Request) -> Response:
    """One model; it is not loaded for it."""
    service: Service = request.app.state.service
    name, adapter = service.pool.find(request.path_params["model"])
    return JSONResponse(_listed(service.pool.entry(name), adapter))


def _listed(entry: Entry, adapter: str | None) -> dict[str, object]:
    """A model, or one of its adapters under a name of its own."""
    described = _described(entry)
    return described if adapter is None else {**described, "id": f"{entry.name}:{adapter}", "parent": entry.name}


def _described(entry: Entry) -> dict[str, object]:
    length = None if entry.model is None else entry.model.context_length
    described = {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "edgephi"}
    where = None if entry.model is None else _where(entry.model.place)
    return {**described, "state": entry.state, "context_length": length, "edgephi": where}


def _where(place: Place) -> dict[str, object]:
    """Where a loaded model computes, from what is known without asking onnxruntime again."""
    device, placement = place.device, place.placement
    return {
        "provider": place.choice.provider,
        "decode_provider": place.choice.decode_provider or place.choice.provider,
        "device": None if device is None else {"kind": device.kind, "vendor": device.vendor},
        "threads": place.threads,
        # null: there is no provider but the CPU's, which has all nodes
        "placement": None
        if placement is None
        else [
            {"provider": part.provider, "nodes": part.nodes, "weight_bytes": part.weight_bytes}
            for part in placement.providers
        ],
        "rejected": list(place.rejected),
    }


async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a conversation."""
    service: Service = request.app.state.service
    asked = parse(TokenizeRequest, await read_json(request.receive, request.headers, service.settings))
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError(
            "prompt and messages are given together, or neither is", remedy="Give one of them", param="prompt"
        )
    name, _ = service.pool.find(asked.model)
    if (prompt := asked.prompt) is not None:
        tokens = await service.with_model(
            request.receive, name, lambda model: model.tokenizer.encode(prompt, special=True)
        )
    else:
        conversation = read_conversation(as_given(asked), service.settings)
        messages, tools = conversation.messages, conversation.arguments.get("tools")
        tokens = await service.with_model(request.receive, name, lambda model: model.encode_chat(messages, tools=tools))
    return JSONResponse({"tokens": tokens, "count": len(tokens)})


async def detokenize(request: Request) -> Response:
    """The text of token ids; special tokens are shown."""
    service: Service = request.app.state.service
    asked = parse(DetokenizeRequest, await read_json(request.receive, request.headers, service.settings))
    if any(not 0 <= token < 2**31 for token in asked.tokens):
        raise RequestError("a token id is out of range", remedy="Give ids that /tokenize gave", param="tokens")
    name, _ = service.pool.find(asked.model)
    text = await service.with_model(
        request.receive, name, lambda model: model.tokenizer.decode(asked.tokens, special=True)
    )
    return JSONResponse({"text": text})


async def embeddings(request: Request) -> Response:
    """Refused: none of the models gives embeddings."""
    raise RequestError(
        "the models of this server write text and give no embeddings",
        remedy="Use a model made for embeddings, with another program",
        status=400,
        code="unsupported_endpoint",
    )


async def health(request: Request) -> Response:
    """Whether requests are taken, and for who has a key which models are in memory; none is loaded for it."""
    service: Service = request.app.state.service
    told: dict[str, object] = {"status": "ending" if service.draining else "ok"}
    if has_key(request.headers, service.settings):
        told["models"] = {entry.name: entry.state for entry in service.pool.entries.values()}
        told |= {"running": service.gate.running, "waiting": service.gate.waiting}
    return JSONResponse(told, 503 if service.draining else 200)


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})
