"""1,000 requests that no client should send: none gets status 500, none hangs, and the memory stays flat."""

from __future__ import annotations

# ruff: noqa: E402 - what is not installed skips these tests before it is imported
import json
import random
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("starlette", "uvicorn", "prometheus_client", "httpx", "schemathesis"):
    pytest.importorskip(package)

import httpx
import psutil
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from edgephi.devices.memory import return_freed_memory
from edgephi.runtime.server.openapi import document
from tests.serving import Running, comes_to_rest, serving

EACH, RAW = 15, 800
FLAT_BYTES = 20e6
HANGS_S = 60.0


@pytest.fixture
def running(hermes_bundle: Path) -> Iterator[Running]:
    with serving({"tiny": hermes_bundle}, max_tokens=4, idle_s=0, queue_s=5, body_s=2) as running:
        yield running


def operations() -> list[Any]:
    return [found.ok() for found in schemathesis.openapi.from_dict(document()).get_all_operations()]


def test_the_document_is_whole() -> None:
    found = {(operation.method.upper(), operation.path) for operation in operations()}
    assert ("POST", "/v1/chat/completions") in found and ("DELETE", "/v1/responses/{response_id}") in found
    assert len(found) == 15
    chat = document()["components"]["schemas"]["ChatRequest"]  # type: ignore[index]
    assert chat["additionalProperties"] is False, "a client can see which parameters there are"
    assert "top_p" in chat["properties"]


def test_a_thousand_malformed_requests(running: Running) -> None:
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=running.url, timeout=HANGS_S) as client:
        warm = Counter[int]()
        send_generated(client, warm, 8, start=1000)
        send_raw(running.port, warm, 60, start=1000)
        before = resident()
        send_generated(client, statuses, EACH, start=0)
        send_raw(running.port, statuses, RAW, start=0)
        grown = resident() - before
        after = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2})
    assert sum(statuses.values()) >= 1000, statuses
    assert not [status for status in statuses if status >= 500], statuses
    assert {200, 400, 404, 405, 415} <= set(statuses), statuses
    assert after.status_code == 200, after.text
    assert comes_to_rest(running.service)
    assert grown < FLAT_BYTES, f"{grown / 1e6:.1f} MB more"


def send_generated(client: httpx.Client, statuses: Counter[int], each: int, *, start: int) -> None:
    """What schemathesis makes of the OpenAPI document, right and wrong, with the model's name where there is one."""
    for place, operation in enumerate(operations()):
        for mode in (GenerationMode.NEGATIVE, GenerationMode.POSITIVE):
            if operation.method == "get" and (mode is GenerationMode.NEGATIVE or "{" not in operation.path):
                continue
            if operation.method == "delete" and mode is GenerationMode.NEGATIVE:
                continue

            @seed(start + place)
            @settings(
                max_examples=each,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                statuses[sent(client, case)] += 1

            send()


def sent(client: httpx.Client, case: Any) -> int:
    body, content = case.body, b""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body = {**body, "model": "tiny"}
    if isinstance(body, bytes):
        content = body
    elif isinstance(body, dict | list | str | int | float | bool) or body is None:
        content = json.dumps(body).encode()
    path = case.path
    for name, value in (case.path_parameters or {}).items():
        path = path.replace(f"{{{name}}}", str(value))
    headers = {"content-type": "application/json"} if case.method != "GET" else {}
    answered = client.request(case.method, httpx.URL(path=path), content=content, headers=headers)
    assert answered.status_code < 500, f"{case.method} {path} {content[:500]!r}: {answered.text}"
    if answered.status_code >= 400 and answered.status_code != 405:
        assert answered.json()["error"]["message"]
    return answered.status_code


BODY = b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}'
REQUESTS = [
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
    b"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    b"GET /v1/models/tiny HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n",
    b"OPTIONS /v1/responses HTTP/1.1\r\nHost: localhost\r\nAccess-Control-Request-Method: POST\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


def mutated(rng: random.Random) -> bytes:
    """A request with bytes changed, left out, doubled, or cut off."""
    data = bytearray(rng.choice(REQUESTS))
    for _ in range(rng.randrange(4)):
        place = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randrange(1, 20)]
            case 2:
                data[place:place] = data[place : place + rng.randrange(1, 200)] * rng.randrange(1, 5)
            case 3:
                del data[place:]
            case 4:
                data[place:place] = rng.choice([b"\r\n", b"\0", b"\xff" * 9, b": ", b"%00", b"../", b"9" * 400])
        data = data or bytearray(b"\0")
    return bytes(data)


def send_raw(port: int, statuses: Counter[int], count: int, *, start: int) -> None:
    """Bytes over sockets; 0 stands for a connection that the server closed without a word."""
    rng = random.Random(start)
    for _ in range(count):
        data = mutated(rng)
        with socket.create_connection(("127.0.0.1", port), timeout=HANGS_S) as connection:
            said = b""
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(65536):
                    said += piece
            except ConnectionError:
                pass
        status = int(said[9:12]) if said.startswith(b"HTTP/1.") else 0
        assert status < 500, f"{data!r}\n{said!r}"
        assert b"Traceback" not in said
        statuses[status] += 1


def resident() -> int:
    return_freed_memory()
    return int(psutil.Process().memory_info().rss)
