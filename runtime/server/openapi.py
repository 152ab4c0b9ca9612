"""The OpenAPI document, made from the models that requests are read with."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from edgephi.runtime.server.anthropic import CountRequest, MessagesRequest
from edgephi.runtime.server.completions import CompletionRequest
from edgephi.runtime.server.openai_chat import ChatRequest
from edgephi.runtime.server.parameters import Strict
from edgephi.runtime.server.response_request import ResponsesRequest
from edgephi.runtime.server.small_endpoints import DetokenizeRequest, TokenizeRequest


class EmbeddingsRequest(Strict):
    """Of `/v1/embeddings`, which is refused."""

    model: str
    input: str | list[str]


REQUESTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation"),
    "/v1/completions": (CompletionRequest, "Continue a text"),
    "/v1/responses": (ResponsesRequest, "Answer, and remember the conversation"),
    "/v1/messages": (MessagesRequest, "Answer a conversation (Anthropic's interface)"),
    "/v1/messages/count_tokens": (CountRequest, "Tokens of a conversation"),
    "/v1/embeddings": (EmbeddingsRequest, "Refused: the models give none"),
    "/tokenize": (TokenizeRequest, "Token ids of a text or a conversation"),
    "/detokenize": (DetokenizeRequest, "The text of token ids"),
}
"""What is posted, and what it does."""
LISTED = {
    "/v1/models": "All models",
    "/health": "Whether requests are taken, and which models are in memory",
    "/metrics": "Numbers for Prometheus",
    "/openapi.json": "This document",
}
STREAMED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})


@cache
def document() -> dict[str, object]:
    """The OpenAPI 3.1 document of a server."""
    kinds = [(kind, "validation") for kind, _ in REQUESTS.values()]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, object] = {}
    for path, (kind, summary) in REQUESTS.items():
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        answers = {"application/json": {"schema": {"type": "object"}}}
        if path in STREAMED:
            answers["text/event-stream"] = {"schema": {"type": "string"}}
        operation = _operation(summary, path, "post", {"description": "Done.", "content": answers})
        paths[path] = {"post": {**operation, "requestBody": {"required": True, "content": body}}}
    for path, summary in LISTED.items():
        kind_of = "text/plain" if path == "/metrics" else "application/json"
        done: dict[str, object] = {"description": "Done.", "content": {kind_of: {"schema": {}}}}
        paths[path] = {"get": _operation(summary, path, "get", done)}
    paths["/v1/models/{model}"] = {"get": _with_name("model", "One model")}
    stored = {"get": _with_name("response_id", "A response"), "delete": _with_name("response_id", "Forget a response")}
    paths["/v1/responses/{response_id}"] = stored
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgephi", "version": version("edgephi")},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(summary: str, path: str, method: str, done: dict[str, object]) -> dict[str, object]:
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    refused = {"description": "Refused; the sentence says why.", **error}
    name = f"{method}{path.replace('/', '_').replace('{', '').replace('}', '')}"
    return {"operationId": name, "summary": summary, "responses": {"200": done, "default": refused}}


def _with_name(name: str, summary: str) -> dict[str, object]:
    parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    done: dict[str, object] = {
        "description": "Done.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
    method = "delete" if summary.startswith("Forget") else "get"
    return {**_operation(summary, f"/{name}", method, done), "parameters": [parameter]}


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "type": {"type": "string"},
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        },
    },
}
