"""The page at `/`: static files beside this module, and the headers under which a browser runs them."""

from __future__ import annotations

import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"
"""They need no key, because they hold nothing but the page."""
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
"""Python's own table comes from the registry on Windows, where a program may have called `.js` plain text; a browser
then runs no module."""
HEADERS = {
    # what a model writes can load and run nothing, whatever the renderer does with it
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class _Files(StaticFiles):
    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(HEADERS)
        if isinstance(response, FileResponse):
            response.headers["content-type"] = f"{TYPES[Path(full_path).suffix]}; charset=utf-8"
        return response


def page_routes() -> list[Route]:
    """A route for each file of the page, and `/`. A mount would take all other paths too, and with them the methods
    that an endpoint does not have."""
    files = _Files(directory=FOLDER)

    def route(path: str, name: str) -> Route:
        async def file(request: Request) -> Response:
            return await files.get_response(name, request.scope)

        return Route(path, file, methods=["GET"])

    return [route("/", "index.html"), *(route(f"/{file.name}", file.name) for file in sorted(FOLDER.iterdir()))]
