"""Who may ask a server, how much and when: keys, hosts, origins, bodies, the queue, times; and what errors say."""

# ruff: noqa: E402 - what is not installed skips these tests before it is imported

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

for package in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)

import httpx
from starlette.datastructures import Headers

from edgephi.errors import BundleError, DeviceError, EngineError, OutputError
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.moderation import Moderation
from edgephi.runtime.server.generation import Generation
from edgephi.runtime.server.limits import ClientGone, check_headers
from edgephi.runtime.server.settings import ServerSettings
from edgephi.runtime.server.sse import EventStream
from tests.planted_tools import Reciter
from tests.serving import Planted, Running, serving

KEY = "a-key-of-22-characters"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hm"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def planted(hermes_bundle: Path) -> Planted:
    return Planted(hermes_bundle)


@pytest.fixture(scope="module")
def running(planted: Planted) -> Iterator[Running]:
    with serving({"tiny": planted}, body_bytes=20_000) as running:
        yield running


def code_of(answered: httpx.Response) -> object:
    return answered.json()["error"]["code"]


def test_a_request_needs_a_key_where_there_are_keys(planted: Planted) -> None:
    with (
        serving({"tiny": planted}, api_keys=("x" * 20, KEY)) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"x-api-key": KEY + "x"}):
            refused = client.get("/v1/models", headers=headers)
            assert (refused.status_code, code_of(refused)) == (401, "invalid_api_key")
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 401
        assert client.get("/metrics").status_code == 401
        assert (free := client.get("/health")).status_code == 200
        assert free.json() == {"status": "ok"}, "names of models are for who has a key"
        assert client.get("/health", headers={"x-api-key": KEY}).json()["models"] == {"tiny": "sleeping"}
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            assert client.get("/v1/models", headers=headers).status_code == 200


def test_another_name_than_the_servers_is_refused(running: Running, planted: Planted) -> None:
    for host, status in [
        ("evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("", 403),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("[::1]", 200),
        ("localhost:", 200),
        ("localhost:80@evil.example", 403),
        ("user@localhost", 403),
        (":8080", 403),
    ]:
        for path in ("/v1/models", "/health", "/"):
            assert httpx.get(running.url + path, headers={"host": host}, timeout=60).status_code == status, (host, path)
    with serving({"tiny": planted}, allowed_hosts=("box.lan",)) as named:
        assert httpx.get(f"{named.url}/v1/models", headers={"host": "box.lan:1"}, timeout=60).status_code == 200
    own = ServerSettings(host="Box.lan", api_keys=(KEY,))  # a browser sends it in small letters
    check_headers(Headers({"host": "box.lan:8080"}), own, needs_key=False)


def test_pages_of_other_origins_are_refused(running: Running, planted: Planted) -> None:
    asks = {"access-control-request-method": "POST"}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        refused = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT, headers={"origin": origin}, timeout=60)
        assert (refused.status_code, code_of(refused)) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in refused.headers
        assert (
            httpx.options(f"{running.url}/v1/models", headers={"origin": origin, **asks}, timeout=60).status_code == 403
        )
    assert httpx.get(f"{running.url}/v1/models", headers={"origin": running.url}, timeout=60).status_code == 200
    with serving({"tiny": planted}, allowed_origins=("https://app.example",), api_keys=(KEY,)) as open_:
        allowed = {"origin": "https://app.example"}
        # the official clients send many of the second sort
        named = {"access-control-request-headers": "authorization,x-stainless-os"}
        before = httpx.options(f"{open_.url}/v1/models", headers={**allowed, **asks, **named}, timeout=60)
        assert before.status_code == 204
        assert before.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        for key, status in ((KEY, 200), ("wrong", 401)):  # the page can read why it is refused
            seen = httpx.get(f"{open_.url}/v1/models", headers={**allowed, "x-api-key": key}, timeout=60)
            assert seen.status_code == status
            assert seen.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hm " * 5000}]}),
        ("/v1/completions", {"prompt": "Hm " * 5000}),
        ("/v1/responses", {"input": "Hm " * 5000}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_named_as_the_interface_does(
    running: Running, path: str, body: dict[str, Any], stream: bool
) -> None:
    refused = httpx.post(running.url + path, json={"model": "tiny", "stream": stream, **body}, timeout=60)
    assert (refused.status_code, code_of(refused)) == (400, "context_length_exceeded")
    assert refused.json()["error"]["param"] in body


def test_a_call_that_has_to_be_needs_a_tool_in_anthropics_interface_too(running: Running) -> None:
    asked = {**CHAT, "tool_choice": {"type": "any"}}
    refused = httpx.post(f"{running.url}/v1/messages", json=asked, timeout=60)
    assert refused.status_code == 400
    assert "there are no tools (tool_choice)" in refused.json()["error"]["message"]
    labelled = httpx.post(f"{running.url}/v1/messages", json={**CHAT, "metadata": {"user_id": "me"}}, timeout=60)
    assert labelled.status_code == 200


def test_counting_tokens_has_a_queue_of_its_own(hermes_bundle: Path) -> None:
    begun, may_end = threading.Semaphore(0), threading.Event()

    def slow_tokenizer() -> Model:
        model = load(hermes_bundle, threads=1)
        encode = model.tokenizer.encode

        def slowly(text: str, **more: Any) -> list[int]:
            if text == "slow":
                begun.release()
                assert may_end.wait(120)
            return encode(text, **more)

        model.tokenizer.encode = slowly  # type: ignore[method-assign]
        return model

    with serving({"tiny": slow_tokenizer}, parallel=1, queue=1, queue_s=1) as running:

        def count(prompt: str, timeout: float) -> httpx.Response:
            return httpx.post(f"{running.url}/tokenize", json={"model": "tiny", "prompt": prompt}, timeout=timeout)

        assert count("x", 30).status_code == 200
        try:
            with pytest.raises(httpx.ReadTimeout):
                count("slow", 0.5)
            assert begun.acquire(timeout=60)
            full = count("x", 30)  # the client is gone, and its thread is not
            assert (full.status_code, code_of(full)) == (429, "queue_full")
            assert httpx.post(f"{running.url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
        finally:
            may_end.set()
        assert count("x", 30).status_code == 200


def test_an_answer_ends_with_its_client_before_its_first_event() -> None:
    ended = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b""

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        raise ClientGone

    stream = EventStream(events(), lambda: ended.append(True))
    asyncio.run(stream({"type": "http"}, receive, send))
    assert ended


def test_who_has_the_answer_finds_the_place_free() -> None:
    class Ready:
        """A stream that is at its end."""

        prompt_tokens, logprobs = 1, ()

        def __iter__(self) -> Iterator[str]:
            return iter(())

        def result(self) -> Any:
            return object()

    async def told_at_its_end(stream: Callable[[], Any]) -> int:
        """How many events there are for who reads."""
        told: list[int] = []
        generation = Generation(stream, lambda answer: told.append(generation._events.qsize()), Moderation())
        await asyncio.to_thread(generation.run)
        await asyncio.sleep(0)
        return told[0]

    assert asyncio.run(told_at_its_end(Ready)) == 1, "the start"
    assert asyncio.run(told_at_its_end(failing(EngineError("no", remedy="-")))) == 0


def test_a_body_without_end_is_not_read_without_end(running: Running) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as endless:
        endless.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        deadline = time.monotonic() + 60
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                endless.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
                time.sleep(0.01)


def test_bodies_are_bounded(running: Running, planted: Planted) -> None:
    url = f"{running.url}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    large = httpx.post(url, content=b'{"model": "' + b"x" * 30_000 + b'"}', headers=json_type, timeout=60)
    assert (large.status_code, code_of(large)) == (413, "body_too_large")
    for headers in ({"content-type": "text/plain"}, {}, {**json_type, "content-encoding": "gzip"}):
        other = httpx.post(url, content=b"{}", headers=headers, timeout=60)
        assert (other.status_code, code_of(other)) == (415, "not_json")
    for body in (
        b"",
        b"[]",
        b"{",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'"\\ud800"',
        b'{"a": "\\ud800"}',
        b"\xff",
        b"[" * 9999,
    ):
        bad = httpx.post(url, content=body, headers=json_type, timeout=60)
        assert (bad.status_code, code_of(bad)) == (400, "not_json"), body
    with (
        serving({"tiny": planted}, body_s=0.5) as strict,
        socket.create_connection(("127.0.0.1", strict.port), timeout=60) as slow,
    ):
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


class Blocked:
    """Answers that wait until the test lets them go on, or somebody cancels them."""

    def __init__(self, planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.reached = threading.Semaphore(0)
        blocked = self

        def prefill(self: Reciter, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
            if tokens:  # of the prompt
                blocked.reached.release()
            deadline = time.monotonic() + 120
            while not blocked.free.is_set() and not cancelled():
                assert time.monotonic() < deadline
                time.sleep(0.005)
            return not cancelled()

        monkeypatch.setattr(Reciter, "prefill", prefill)
        planted.answers[:] = ["ok"] * 20


def in_threads(count: int, work: Callable[[], Any]) -> tuple[list[threading.Thread], list[Any]]:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def waiting_becomes(count: int, running: Running) -> bool:
    """Whether so many wait in the queue, in a minute at most."""
    deadline = time.monotonic() + 60
    while running.service.gate.waiting != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return running.service.gate.waiting == count


def test_a_full_queue_says_when_to_come_again(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Blocked(planted, monkeypatch)
    with serving({"tiny": planted}, parallel=2, queue=1) as running:
        url = f"{running.url}/v1/chat/completions"
        threads, results = in_threads(3, lambda: httpx.post(url, json=CHAT, timeout=60).status_code)
        assert blocked.reached.acquire(timeout=60) and blocked.reached.acquire(timeout=60)
        assert waiting_becomes(1, running), "the third one is on its way"
        health = httpx.get(f"{running.url}/health", timeout=60).json()
        assert (health["running"], health["waiting"]) == (2, 1)
        refused = httpx.post(url, json=CHAT, timeout=60)
        assert (refused.status_code, code_of(refused)) == (429, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        blocked.free.set()
        for thread in threads:
            thread.join(120)
        assert results == [200] * 3
        assert httpx.post(url, json=CHAT, timeout=60).status_code == 200


def test_waiting_and_answering_are_bounded_in_time(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Blocked(planted, monkeypatch)
    with serving({"tiny": planted}, parallel=1, queue_s=0.2) as running:
        url = f"{running.url}/v1/chat/completions"
        threads, results = in_threads(1, lambda: httpx.post(url, json=CHAT, timeout=120).status_code)
        assert blocked.reached.acquire(timeout=60)
        waited = httpx.post(url, json=CHAT, timeout=60)
        assert (waited.status_code, code_of(waited)) == (429, "queue_full")
        blocked.free.set()
        threads[0].join(120)
        assert results == [200]
    blocked.free.clear()
    with serving({"tiny": planted}, parallel=1, answer_s=0.5) as running:
        url = f"{running.url}/v1/chat/completions"
        late = httpx.post(url, json=CHAT, timeout=60)
        assert (late.status_code, code_of(late)) == (504, "answer_timeout")
        streamed = httpx.post(url, json={**CHAT, "stream": True}, timeout=60).text
        assert "event: error" in streamed and "answer_timeout" in streamed and "[DONE]" not in streamed


def test_who_leaves_the_queue_is_not_answered(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Blocked(planted, monkeypatch)
    with serving({"tiny": planted}, parallel=1) as running:
        url = f"{running.url}/v1/chat/completions"
        threads, results = in_threads(1, lambda: httpx.post(url, json=CHAT, timeout=60).status_code)
        assert blocked.reached.acquire(timeout=60)
        body = json.dumps(CHAT).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as leaves:
            leaves.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert waiting_becomes(1, running)
        assert waiting_becomes(0, running), "who left still waits"
        blocked.free.set()
        threads[0].join(120)
        assert results == [200]
        assert not blocked.reached.acquire(timeout=0.2)
        assert httpx.get(f"{running.url}/health", timeout=60).json()["waiting"] == 0


def failing(error: Exception) -> Callable[[], Model]:
    def load() -> Model:
        raise error

    return load


def test_errors_have_a_status_and_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    cases = {
        "bundle": (BundleError("a file is missing", remedy="Export again"), 503, "model_unusable"),
        "device": (DeviceError("the process died", remedy="Try again", step="process"), 503, "device_unusable"),
        "disk": (OutputError("the disk is full", remedy="Free space"), 507, "storage_full"),
        "engine": (EngineError("the runtime refuses", remedy="Report it"), 500, "engine_error"),
        "memory": (MemoryError(), 503, "out_of_memory"),
        "other": (KeyError("a secret"), 500, "internal_error"),
    }
    with serving({name: failing(error) for name, (error, _, _) in cases.items()}) as running:
        for name, (_, status, code) in cases.items():
            answered = httpx.post(f"{running.url}/v1/chat/completions", json={**CHAT, "model": name}, timeout=60)
            assert (answered.status_code, code_of(answered)) == (status, code)
            assert "Traceback" not in answered.text and "secret" not in answered.text
            other = httpx.post(f"{running.url}/v1/messages", json={**CHAT, "model": name}, timeout=60)
            assert other.status_code == status
            assert other.json()["type"] == "error"
        assert httpx.get(f"{running.url}/health", timeout=60).json()["running"] == 0
    assert "unexpected KeyError: " in capfd.readouterr().err


def test_small_endpoints(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        tokens = client.post("/tokenize", json={"model": "tiny", "prompt": "on true"}).json()
        assert tokens["count"] == len(tokens["tokens"])
        assert client.post("/detokenize", json={"model": "tiny", "tokens": tokens["tokens"]}).json() == {
            "text": "on true"
        }
        chat = client.post("/tokenize", json={"model": "tiny", "messages": CHAT["messages"]}).json()
        counted = client.post(
            "/v1/messages/count_tokens", json={key: CHAT[key] for key in ("model", "messages")}
        ).json()
        assert chat["count"] == counted["input_tokens"]
        assert client.post("/detokenize", json={"model": "tiny", "tokens": [2**40]}).status_code == 400
        assert client.post("/tokenize", json={"model": "tiny"}).status_code == 400
        assert client.get("/v1/models/none").status_code == 404
        assert client.get("/nothing").status_code == 404
        wrong = client.get("/v1/chat/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert client.get("/openapi.json").json()["openapi"] == "3.1.0"
        answered = client.post("/v1/chat/completions", json=CHAT)
        assert "date" in answered.headers and answered.headers["x-content-type-options"] == "nosniff"
        counts = client.get("/metrics").text
        assert 'edgephi_requests_total{path="/nothing"' not in counts
        assert 'edgephi_requests_total{path="other",status="404"} 1.0' in counts
        assert 'edgephi_generated_tokens_total{model="tiny"}' in counts


def test_stored_responses_are_bounded(planted: Planted) -> None:
    with (
        serving({"tiny": planted}, stored_responses=3) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        asked = {"model": "tiny", "input": "Hm", "max_output_tokens": 2}
        keys = [client.post("/v1/responses", json=asked, timeout=60).json()["id"] for _ in range(5)]
        assert [client.get(f"/v1/responses/{key}").status_code for key in keys] == [404, 404, 200, 200, 200]
    with serving({"tiny": planted}, stored_bytes=10) as running:
        key = httpx.post(f"{running.url}/v1/responses", json=asked, timeout=60).json()["id"]
        assert httpx.get(f"{running.url}/v1/responses/{key}", timeout=60).status_code == 404
