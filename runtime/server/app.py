"""The application: its routes, and what holds for every request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgephi.errors import EdgephiError
from edgephi.runtime.moderation import NO_MODERATION, ContentFilter, Moderation, Moderator
from edgephi.runtime.server import anthropic, completions, openai_chat, responses, small_endpoints
from edgephi.runtime.server.errors import Fault, RequestError, fault
from edgephi.runtime.server.limits import ClientGone, check_headers
from edgephi.runtime.server.models import Source
from edgephi.runtime.server.openapi import document
from edgephi.runtime.server.service import Service
from edgephi.runtime.server.settings import ServerSettings
from edgephi.runtime.server.static_page import page_routes


def create_app(
    models: Mapping[str, Source],
    settings: ServerSettings | None = None,
    *,
    adapters: Mapping[str, Mapping[str, Path | str]] | None = None,
    moderator: Moderator = NO_MODERATION,
    content_filter: ContentFilter | None = None,
) -> Starlette:
    """A server for these models, by name: bundles' folders, or functions that load one.

    Nothing is loaded before it is asked for. `Starlette.state.service` is its inside.

    Args:
        settings: its bounds.
        adapters: files of LoRA adapters, by the model's name and their own. A request names one as `MODEL:ADAPTER`, or
            in the field `adapter`.
        moderator: judges every prompt (one that is not allowed is refused with the code `content_filter`) and every
            answer before it is sent, sentence by sentence. An answer that is not allowed ends before that sentence,
            and says so (`content_filter`; `refusal` in Anthropic's interface).
        content_filter: what is allowed.
    """
    moderation = Moderation(moderator, content_filter or ContentFilter())
    service = Service(models, settings or ServerSettings(), adapters or {}, moderation)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.close()

    async def openapi(request: Request) -> Response:
        return JSONResponse(document())

    routes = [
        Route("/v1/chat/completions", openai_chat.chat_completions, methods=["POST"]),
        Route("/v1/completions", completions.completions, methods=["POST"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/{response_id}", responses.retrieve, methods=["GET"]),
        Route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"]),
        Route("/v1/messages", anthropic.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=["POST"]),
        Route("/v1/models", small_endpoints.models, methods=["GET"]),
        Route("/v1/models/{model:path}", small_endpoints.model, methods=["GET"]),
        Route("/v1/embeddings", small_endpoints.embeddings, methods=["POST"]),
        Route("/tokenize", small_endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", small_endpoints.detokenize, methods=["POST"]),
        Route("/health", small_endpoints.health, methods=["GET"]),
        Route("/metrics", small_endpoints.metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        *page_routes(),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Border, service=service)],
        exception_handlers={
            EdgephiError: _refuse,
            MemoryError: _refuse,
            HTTPException: _no_route,
        },
    )
    app.state.service = service
    return app


class Border:
    """Around every request: headers are checked before anything else, what was answered is counted, and an error that
    nobody meant becomes status 500 and a line on stderr.

    Args:
        app: what is inside.
        service: of the server.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, origin = Headers(scope=scope), None
        begun = False
        settings = self._service.settings

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._service.metrics.requests.labels(_route(scope), message["status"]).inc()
                added = MutableHeaders(raw=message.setdefault("headers", []))
                added["date"] = formatdate(usegmt=True)
                added["x-content-type-options"] = "nosniff"
                if origin is not None:
                    added["access-control-allow-origin"] = origin
                    added["access-control-expose-headers"] = "retry-after"
                    added["vary"] = "Origin"
                if self._service.draining or message["status"] in (408, 413):  # its body may go on without end
                    added["connection"] = "close"
            try:
                await send(message)
            except Exception as problem:  # the bytes that came were no HTTP, and the connection is given up
                raise ClientGone from problem

        try:
            if (given := headers.get("origin")) in settings.allowed_origins:
                origin = given  # errors are for its page too
            asks = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
            free = asks or scope["path"] == "/health" or _is_page(scope["path"])
            check_headers(headers, settings, needs_key=not free)
            if asks and origin is not None:
                await _preflight(headers)(scope, receive, sending)
                return
            await self._app(scope, receive, sending)
        except ClientGone:
            pass  # nobody would read it
        except RequestError as error:
            with suppress(ClientGone):
                await _shown(scope["path"], fault(error))(scope, receive, sending)
        except Exception as error:
            told = fault(error)
            if not begun:
                with suppress(ClientGone):
                    await _shown(scope["path"], told)(scope, receive, sending)


_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages/count_tokens",
    "/v1/messages",
    "/v1/responses",
    "/v1/models",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/health",
    "/metrics",
    "/openapi.json",
)


def _route(scope: Scope) -> str:
    """A path of few: names that clients make up would be numbers without end."""
    path: str = scope["path"]
    return next((route for route in _ROUTES if path == route or path.startswith(f"{route}/")), "other")


def _is_page(path: str) -> bool:
    """Whether a path is of the page: all that are no endpoint."""
    return not path.startswith(("/v1/", *_ROUTES))


def _preflight(asked: Headers) -> Response:
    """All headers are allowed: the official clients send many that only describe them."""
    allowed = {"access-control-allow-methods": "GET, POST, DELETE", "access-control-max-age": "600"}
    if (names := asked.get("access-control-request-headers")) is not None:
        allowed["access-control-allow-headers"] = names
    return Response(status_code=204, headers=allowed)


def _shown(path: str, told: Fault) -> Response:
    body = told.anthropic() if path.startswith("/v1/messages") else told.openai()
    return JSONResponse(body, told.status, headers=dict(told.headers))


async def _refuse(request: Request, error: Exception) -> Response:
    return _shown(request.url.path, fault(error))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method[:20], request.url.path[:200]
    what = f"there is nothing at {path}" if error.status_code == 404 else f"{path} does not take {method}"
    told = Fault(error.status_code, f"{what}. See /openapi.json for what there is.", "no_such_endpoint")
    response = _shown(request.url.path, told)
    response.headers.update(error.headers or {})
    return response
