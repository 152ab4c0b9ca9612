"""Server-sent events: a response whose body is made while it is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgephi.runtime.server.limits import ClientGone, unless_gone

PING_S = 15.0
"""A comment is sent when nothing else was for so long, so that nobody on the way takes the connection for dead."""
PING = b": computing\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, object], name: str | None = None) -> bytes:
    """One event; `name`: for clients that tell events apart by it."""
    line = f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
    return (line if name is None else f"event: {name}\n{line}").encode()


class EventStream(Response):
    """Sends events as they come.

    Args:
        events: encoded events; it raises nothing, because the status has been sent.
        end: called when all is sent or the client left, also before the first event: there a generator that never ran
            would end nothing.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], end: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_all() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            coming = asyncio.ensure_future(anext(self._events, None))
            try:
                while True:
                    await asyncio.wait((coming,), timeout=PING_S)
                    body = (await coming) if coming.done() else PING
                    if body is None:
                        break
                    if coming.done():
                        coming = asyncio.ensure_future(anext(self._events, None))
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait((coming,))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with suppress(ClientGone):
                await unless_gone(receive, send_all())
        finally:
            self._end()
            await self._events.aclose()
