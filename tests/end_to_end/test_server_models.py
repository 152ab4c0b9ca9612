"""Models of a server: loaded when asked for, unloaded when they rest or memory is short, and what faults do to them."""

from __future__ import annotations

# ruff: noqa: E402 - what is not installed skips these tests before it is imported
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)

import httpx
import psutil

import edgephi
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.server import models as server_models
from tests.serving import Running, comes_to_rest, serving
from tests.tiny_phi import PHI_3, tiny_phi


def ask(running: Running, model: str, **more: Any) -> httpx.Response:
    asked = {"model": model, "messages": [{"role": "user", "content": "Hm"}], "max_tokens": 4, **more}
    return httpx.post(f"{running.url}/v1/chat/completions", json=asked, timeout=60)


def states(running: Running) -> dict[str, str]:
    found: dict[str, str] = httpx.get(f"{running.url}/health", timeout=60).json()["models"]
    return found


class Unloads:
    """Tells which models are unloaded, and why, in the order in which they are chosen: two that are closed side by side
    are closed in any order."""

    def __init__(self, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reasons: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        counter = running.service.metrics.unloads
        labels = counter.labels

        def told(name: str, reason: str) -> Any:
            with self._changed:
                self.reasons.append((name, reason))
                self._changed.notify_all()
            return labels(name, reason)

        monkeypatch.setattr(counter, "labels", told)

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.reasons) >= count, 60), self.reasons


def test_a_model_sleeps_wakes_and_sleeps_again(hermes_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"a": hermes_bundle, "b": hermes_bundle}, idle_s=0.5) as running:
        unloads = Unloads(running, monkeypatch)
        for path in ("/health", "/metrics", "/v1/models", "/v1/models/a", "/openapi.json"):
            assert httpx.get(running.url + path, timeout=60).status_code == 200
        assert states(running) == {"a": "sleeping", "b": "sleeping"}
        first = ask(running, "a").json()["choices"][0]["message"]["content"]
        assert states(running) == {"a": "loaded", "b": "sleeping"}
        for _ in range(3):  # health keeps none awake
            httpx.get(f"{running.url}/health", timeout=60)
        unloads.wait(1)
        assert states(running) == {"a": "sleeping", "b": "sleeping"}
        assert ask(running, "a").json()["choices"][0]["message"]["content"] == first
        assert ask(running, "b").status_code == 200
        unloads.wait(3)
        assert {reason for _, reason in unloads.reasons} == {"idle"}
        assert (
            'edgephi_model_unloads_total{model="a",reason="idle"} 2.0'
            in httpx.get(f"{running.url}/metrics", timeout=60).text
        )


def test_a_model_in_use_is_not_unloaded(hermes_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"a": hermes_bundle}, idle_s=0.05) as running:
        unloads = Unloads(running, monkeypatch)
        answered = ask(running, "a", max_tokens=400, temperature=2, seed=1, logit_bias={"2": -100})
        assert answered.json()["usage"]["completion_tokens"] == 400
        unloads.wait(1)


def test_many_who_ask_at_once_load_it_once(hermes_bundle: Path) -> None:
    loads = []

    def slow() -> Model:
        loads.append(1)
        time.sleep(0.3)
        return load(hermes_bundle, threads=1, max_parallel=4)

    with serving({"a": slow}) as running:
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(ask(running, "a").status_code)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert statuses == [200] * 6
        assert len(loads) == 1
        assert httpx.get(f"{running.url}/health", timeout=60).json()["running"] == 0


def test_a_load_that_fails_is_tried_again(hermes_bundle: Path) -> None:
    tries = []

    def at_second() -> Model:
        tries.append(1)
        if len(tries) == 1:
            raise edgephi.EdgephiError("not yet", remedy="Try again")
        return load(hermes_bundle, threads=1)

    with serving({"a": at_second}) as running:
        assert ask(running, "a").status_code == 500
        assert states(running) == {"a": "sleeping"}
        assert ask(running, "a").status_code == 200


def test_models_that_rest_give_their_memory_to_others(hermes_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10**12]
    monkeypatch.setattr(server_models, "available_bytes", lambda: free[0])
    with serving({"a": hermes_bundle, "b": hermes_bundle, "c": hermes_bundle}, idle_s=0, pressure_s=0.1) as running:
        unloads = Unloads(running, monkeypatch)
        assert [ask(running, name).status_code for name in "ab"] == [200, 200]
        free[0] = 10**8
        assert ask(running, "c").status_code == 200
        assert unloads.reasons[:2] == [("a", "memory"), ("b", "memory")]
        unloads.wait(3)  # the next look finds that the memory is still short
        assert states(running) == {"a": "sleeping", "b": "sleeping", "c": "sleeping"}
        free[0] = 1000
        refused = ask(running, "a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
        assert refused.headers["retry-after"] == "30"


def test_a_folder_that_vanishes(hermes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(hermes_bundle, folder)
    with serving({"a": folder, "damaged": tmp_path}, idle_s=0.3) as running:
        unloads = Unloads(running, monkeypatch)
        assert ask(running, "a").status_code == 200
        shutil.rmtree(folder)
        unloads.wait(1)
        assert states(running)["a"] == "missing"
        gone = ask(running, "a")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
        assert "the folder of the model 'a' is gone" in gone.json()["error"]["message"]
        damaged = ask(running, "damaged")
        assert (damaged.status_code, damaged.json()["error"]["code"]) == (503, "model_unusable")
        shutil.copytree(hermes_bundle, folder)
        assert ask(running, "a").status_code == 200


def children() -> Iterator[psutil.Process]:
    for child in psutil.Process().children(recursive=True):
        if any("jinja_child" in word for word in child.cmdline()):
            yield child


def test_a_child_process_that_is_killed_is_started_again(hermes_bundle: Path) -> None:
    with serving({"a": hermes_bundle}) as running:
        first = ask(running, "a")
        killed = list(children())
        assert killed
        for child in killed:
            child.kill()
            child.wait(60)
        statuses = [ask(running, "a").status_code for _ in range(2)]
        assert set(statuses) <= {200, 503} and statuses[-1] == 200
        assert ask(running, "a").json()["choices"] == first.json()["choices"]


def test_answers_of_eight_clients_are_those_of_one(tmp_path: Path) -> None:
    """A third of them leaves midway; a full queue is the only refusal."""
    edgephi.export_model(tiny_phi(tmp_path / "source", PHI_3, ascii_text=True), tmp_path / "bundle", precision="fp32")
    prompts = [f"prompt {number} " * (1 + number % 5) for number in range(12)]
    with load(tmp_path / "bundle", threads=1, prefix_cache_bytes=0) as lone:
        expected = {prompt: lone.generate(prompt, max_new_tokens=24).result().text for prompt in prompts}

    def parallel() -> Model:
        return load(tmp_path / "bundle", threads=1, max_parallel=4)

    wrong: list[object] = []
    lock, counts = threading.Lock(), {"whole": 0, "left": 0, 429: 0}

    def client(number: int, url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            for turn in range(10):
                prompt = prompts[(number * 7 + turn) % len(prompts)]
                body = {"model": "a", "prompt": prompt, "max_tokens": 24, "stream": True}
                leave_after = turn % 7 + 1 if (number + turn) % 3 == 0 else None
                outcome: object = read(http, body, leave_after, expected[prompt])
                with lock:
                    if outcome in counts:
                        counts[outcome] += 1  # type: ignore[index]  # it is one of them
                    else:
                        wrong.append(outcome)

    with serving({"a": parallel}, parallel=4, queue=2) as running:
        threads = [threading.Thread(target=client, args=(number, running.url)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert comes_to_rest(running.service)
    assert not wrong, wrong[:3]
    assert counts["whole"] > 10 and counts["left"] > 5, counts


def read(http: httpx.Client, body: dict[str, Any], leave_after: int | None, expected: str) -> object:
    import json

    text, events = "", 0
    with http.stream("POST", "/v1/completions", json=body) as answered:
        if answered.status_code != 200:
            return answered.status_code
        for line in answered.iter_lines():
            if line == "data: [DONE]":
                return "whole" if text == expected else (text, expected)
            if line.startswith("data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
                events += 1
                if events == leave_after:
                    return "left" if expected.startswith(text) else (text, expected)
    return "no end"


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.slow
def test_memory_stays_flat_over_loads(hermes_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"a": hermes_bundle}, idle_s=0) as running:
        unload: Callable[[], Any] = lambda: pool_unload(running)  # noqa: E731
        for _ in range(3):
            ask(running, "a")
            unload()
        before = resident()
        for _ in range(5):
            ask(running, "a")
            unload()
        assert resident() - before < 20e6


def pool_unload(running: Running) -> None:
    import asyncio

    pool = running.service.pool
    loop = running.server._loop
    assert loop is not None
    asyncio.run_coroutine_threadsafe(pool._unload(pool.entries["a"], "test"), loop).result(30)
