"""Who may ask, how much, and when: checks of headers, the bound of a body, the queue."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import re
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from edgephi.runtime.server.errors import RequestError
from edgephi.runtime.server.settings import ServerSettings

Made = TypeVar("Made")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


def check_headers(headers: Headers, settings: ServerSettings, *, needs_key: bool) -> None:
    """Refuse a request by its headers.

    A page in the user's browser can have its own name point to 127.0.0.1 (DNS rebinding); then `Host` is that name. A
    page of another origin says so in `Origin`.

    Raises:
        RequestError: 403 for a host or an origin that is not allowed, 401 for a missing or wrong key.
    """
    host = _host_name(headers.get("host", ""))
    if not _is_address(host) and host not in ("localhost", settings.host.lower(), *settings.allowed_hosts):
        raise RequestError(
            f"the server is not known by the name {host[:100]!r}",
            remedy="Use its address, or start it with --allow-host and this name",
            status=403,
            code="host_not_allowed",
        )
    origin = headers.get("origin")
    if origin is not None and not _is_own(origin, headers) and origin not in settings.allowed_origins:
        raise RequestError(
            f"pages of {origin[:100]} may not use this server",
            remedy="Start it with --allow-origin and this origin",
            status=403,
            code="origin_not_allowed",
        )
    if needs_key and not has_key(headers, settings):
        raise RequestError(
            "the API key is missing or wrong",
            remedy="Send one of the server's keys as `Authorization: Bearer KEY`",
            status=401,
            code="invalid_api_key",
        )


_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:@\[\]]+)(:[0-9]*)?")
"""An IPv6 address in brackets, another address or a name; and a port."""


def _host_name(host: str) -> str:
    found = _HOST.fullmatch(host.lower())
    return found[1].strip("[]") if found else host.lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_own(origin: str, headers: Headers) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""
    except ValueError:
        return False


def has_key(headers: Headers, settings: ServerSettings) -> bool:
    """Whether one of the server's keys came with a request, or it has none."""
    if not settings.api_keys:
        return True
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = (bearer.strip() if scheme.lower() == "bearer" else "") or headers.get("x-api-key", "")
    # every key is compared, so that the time tells nothing
    return sum([hmac.compare_digest(given.encode(), key.encode()) for key in settings.api_keys]) > 0


async def read_json(receive: Receive, headers: Headers, settings: ServerSettings) -> dict[str, object]:
    """The body of a request, a JSON object, within the bounds of size and time.

    Raises:
        RequestError: 415 for another type (a page of another origin may send the others without asking), 413 for a
            body that is too large, 408 for one that does not come, 400 for what is no JSON object.
        ClientGone: the client left before all of it was sent.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(
            f"the body is {kind[:60] or 'of no type'}",
            remedy="Send JSON, uncompressed, with `Content-Type: application/json`",
            status=415,
            code="not_json",
        )
    parts = bytearray()
    try:
        async with asyncio.timeout(settings.body_s):
            await _read(receive, parts, settings.body_bytes)
    except TimeoutError:
        if len(parts) <= settings.body_bytes:
            raise RequestError(
                f"the body did not come within {settings.body_s:g} s",
                remedy="Send it faster",
                status=408,
                code="too_slow",
            ) from None
    if len(parts) > settings.body_bytes:
        raise RequestError(
            f"the body is larger than {settings.body_bytes:,} bytes",
            remedy="Send less",
            status=413,
            code="body_too_large",
        )
    return parse_object(bytes(parts))


async def _read(receive: Receive, parts: bytearray, limit: int) -> None:
    """All of a body. What is beyond the limit is read too, and dropped: a client that still sends reads no answer."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if len(parts) <= limit:
            parts += message.get("body", b"")
        if not message.get("more_body", False):
            return


def parse_object(body: bytes) -> dict[str, object]:
    """A JSON object of valid texts and finite numbers.

    Raises:
        RequestError: it is none.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_not_json, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as problem:
        said = "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)[:200]
        raise RequestError(
            f"the body is no JSON: {said}", remedy="Send a JSON object in UTF-8", code="not_json"
        ) from None
    if not isinstance(value, dict):
        raise RequestError("the body is no JSON object", remedy="Send a JSON object", code="not_json")
    return value


def _not_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON's")


def _finite(word: str) -> float:
    if not math.isfinite(value := float(word)):
        raise ValueError(f"the number {word[:20]} is too large")
    return value


async def unless_gone(receive: Receive, work: Awaitable[Made]) -> Made:
    """Wait for work, and cancel it when the client closes its connection. The body has been read.

    Raises:
        ClientGone: it did.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))


class Gate:
    """Lets so many through at once; the others wait in a row that is not endless.

    Args:
        most: at once.
        queue: how many may wait.
        longest_s: how long one may wait.
    """

    def __init__(self, most: int, queue: int, longest_s: float) -> None:
        self._most, self._queue, self._longest_s = most, queue, longest_s
        self.running = 0
        self._row: deque[asyncio.Future[None]] = deque()
        self._mean_s = 1.0
        self.closed = False

    @property
    def waiting(self) -> int:
        return len(self._row)

    async def enter(self) -> None:
        """Wait for a place; `leave` gives it back.

        Raises:
            RequestError: 429, too many wait or it took too long; 503, the server ends.
        """
        if self.closed:
            raise _ending()
        if self.running < self._most and not self._row:
            self.running += 1
            return
        if len(self._row) >= self._queue:
            raise self._full(f"{self.running} requests are being answered and {len(self._row)} wait")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._row.append(turn)
        try:
            async with asyncio.timeout(self._longest_s):
                await turn
        except BaseException as error:
            if turn in self._row:
                self._row.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave(None)  # it was let through in the moment it gave up
            if isinstance(error, TimeoutError):
                raise self._full(f"no answer could begin within {self._longest_s:g} s") from None
            raise

    def leave(self, seconds: float | None) -> None:
        """Give the place to the next; `seconds`: how long it was held."""
        if seconds is not None:
            self._mean_s += (seconds - self._mean_s) / 8
        while self._row:
            turn = self._row.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    def close(self) -> None:
        """Let nobody in any more; those in the row are refused."""
        self.closed = True
        while self._row:
            turn = self._row.popleft()
            if not turn.done():
                turn.set_exception(_ending())

    def _full(self, what: str) -> RequestError:
        seconds = math.ceil(self._mean_s * (len(self._row) + 1) / self._most)
        return RequestError(
            what, remedy="Try again later", status=429, code="queue_full", retry_after_s=min(max(seconds, 1), 60)
        )


def _ending() -> RequestError:
    return RequestError("the server is ending", remedy="Try again later", status=503, code="ending", retry_after_s=5)
