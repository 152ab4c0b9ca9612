"""A server's adapters, its moderator, and the models that the command names."""

# ruff: noqa: E402 - what is not installed skips these tests before it is imported

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

for package in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)

import httpx

import edgephi
from edgephi.commands.serve import _adapters, _installed, _named
from edgephi.errors import EdgephiError, UsageError
from edgephi.export.adapter import convert_adapter
from edgephi.runtime.moderation import Severity
from edgephi.runtime.tools.formats import HERMES
from edgephi.store.places import models_folder
from tests.lora import random_adapter
from tests.planted_tools import ENDING, TEMPLATES, written
from tests.serving import Planted, Running, serving
from tests.tiny_phi import PHI_3, tiny_phi

TINY = {"self_attn.qkv_proj": (128, 384), "mlp.down_proj": (192, 128)}
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Hm"}], "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served-adapters")
    source = tiny_phi(made / "source", PHI_3, 1024, ascii_text=True)
    (source / "chat_template.jinja").write_text(TEMPLATES[HERMES] + ENDING)
    edgephi.export_model(source, made / "bundle", precision="fp32", lora=8)
    convert_adapter(random_adapter(made / "peft", TINY), made / "bundle", made / "one.onnx_adapter")
    return made


def test_an_adapter_is_named_like_a_model_or_by_its_field(folder: Path) -> None:
    with (
        serving({"m": folder / "bundle"}, adapters={"m": {"one": folder / "one.onnx_adapter"}}) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        listed = client.get("/v1/models").json()["data"]
        assert [(one["id"], one.get("parent")) for one in listed] == [("m", None), ("m:one", "m")]
        assert client.get("/v1/models/m:one").json()["state"] == "sleeping"
        assert client.get("/v1/models/m:two").status_code == 404

        def said(path: str, **more: Any) -> Any:
            answered = client.post(path, json={"model": "m", **more})
            assert answered.status_code == 200, answered.text
            return answered.json()

        def chat(**more: Any) -> str:
            text: str = said("/v1/chat/completions", **{**ASKED, **more})["choices"][0]["message"]["content"]
            return text

        plain = chat()
        adapted = chat(model="m:one")
        assert adapted != plain
        assert chat(adapter="one") == chat(model="m:one", adapter="one") == adapted
        with edgephi.load(folder / "bundle", adapters={"one": folder / "one.onnx_adapter"}) as model:
            assert model.chat(ASKED["messages"], adapter="one", max_new_tokens=12).result().text == adapted
        texts = {said("/v1/completions", prompt="Hm", max_tokens=12, **more)["choices"][0]["text"] for more in MORE}
        assert len(texts) == 2
        outputs = [said("/v1/responses", input="Hm", max_output_tokens=12, **more) for more in MORE]
        assert len({one["output"][0]["content"][0]["text"] for one in outputs}) == 2
        turns = [said("/v1/messages", **ASKED, **more)["content"][0]["text"] for more in MORE[:2]]
        assert turns == [plain, adapted]
        for more in ({"model": "m:two"}, {"adapter": "two"}):
            wrong = client.post("/v1/chat/completions", json={"model": "m", **ASKED, **more})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (404, next(iter(more)))
            assert "Choose from one" in wrong.json()["error"]["message"]


MORE: list[dict[str, Any]] = [{}, {"model": "m:one"}, {"adapter": "one"}]


def test_an_adapter_that_does_not_fit_is_told_at_the_first_request(folder: Path, hermes_bundle: Path) -> None:
    adapters = {"m": {"one": folder / "one.onnx_adapter"}}
    with serving({"m": hermes_bundle}, adapters=adapters) as running:
        refused = httpx.post(f"{running.url}/v1/chat/completions", json={"model": "m", **ASKED}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unusable")


def moderator(text: str, side: str) -> Mapping[str, Severity]:
    return {"hate": Severity.HIGH} if "BAD" in text else {}


@pytest.fixture(scope="module")
def judged(hermes_bundle: Path) -> Iterator[tuple[Running, Planted]]:
    planted = Planted(hermes_bundle)
    with serving({"m": planted}, moderator=moderator) as running:
        yield running, planted


BLOCKED = "One is fine. Two is BAD. Three."
WANTED = [
    ("/v1/chat/completions", ASKED | {"max_tokens": 100}, ("choices", 0, "finish_reason"), "content_filter"),
    ("/v1/completions", {"prompt": "Hm", "max_tokens": 100}, ("choices", 0, "finish_reason"), "content_filter"),
    ("/v1/responses", {"input": "Hm"}, ("incomplete_details", "reason"), "content_filter"),
    ("/v1/messages", ASKED | {"max_tokens": 100}, ("stop_reason",), "refusal"),
]


@pytest.mark.parametrize(("path", "asked", "place", "reason"), WANTED, ids=[path for path, *_ in WANTED])
def test_a_blocked_answer_ends_before_its_sentence(
    judged: tuple[Running, Planted], path: str, asked: dict[str, Any], place: tuple[Any, ...], reason: str
) -> None:
    running, planted = judged
    planted.answers[:] = [BLOCKED, BLOCKED]
    asked = {"model": "m", **asked}
    whole = httpx.post(running.url + path, json=asked, timeout=60).json()
    found = whole
    for part in place:
        found = found[part]
    assert found == reason
    assert whole["edgephi_finish"] == "content_filter"
    assert "One is fine." in json.dumps(whole) and "BAD" not in json.dumps(whole)
    streamed = httpx.post(running.url + path, json={**asked, "stream": True}, timeout=60).text
    assert reason in streamed and "BAD" not in streamed and "Three" not in streamed


def test_tokens_of_what_is_blocked_are_not_told(judged: tuple[Running, Planted]) -> None:
    running, planted = judged
    planted.answers[:] = ["B. BAD. C.", "Fine. Too."]
    asked = {"model": "m", **ASKED, "max_tokens": 100, "logprobs": True}
    url = f"{running.url}/v1/chat/completions"
    texts = []
    for _ in range(2):
        choice = httpx.post(url, json=asked, timeout=60).json()["choices"][0]
        texts.append("".join(one["token"] for one in choice["logprobs"]["content"]))
        assert choice["message"]["content"].startswith(texts[-1].strip()[:2])
    assert "BAD" not in texts[0] and texts[1] == "Fine. Too."


def test_calls_with_blocked_arguments_are_not_given_out(judged: tuple[Running, Planted]) -> None:
    running, planted = judged
    planted.answers[:] = [written(HERMES, "look", {"what": "BAD"})]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    asked = {"model": "m", **ASKED, "max_tokens": 100, "tools": [tool]}
    choice = httpx.post(f"{running.url}/v1/chat/completions", json=asked, timeout=60).json()["choices"][0]
    assert choice["finish_reason"] == "content_filter" and "tool_calls" not in choice["message"]


def test_a_blocked_prompt_is_refused(judged: tuple[Running, Planted]) -> None:
    running, _ = judged
    for path, asked in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "BAD"}]}),
        ("/v1/completions", {"prompt": "BAD"}),
        ("/v1/responses", {"input": "BAD"}),
    ):
        refused = httpx.post(running.url + path, json={"model": "m", **asked}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter")
        assert "hate" in refused.json()["error"]["message"]


def test_models_are_named_as_the_store_has_them(hermes_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model is installed"):
        _installed()
    with pytest.raises(EdgephiError, match="edgephi list"):
        _named("tiny")
    installed = models_folder() / "tiny"
    shutil.copytree(hermes_bundle, installed)
    try:
        assert _installed() == ["tiny"]
        assert _named("tiny") == ("tiny", installed, None)
        assert _named("tiny@cpu") == ("tiny@cpu", installed, "cpu")
        assert _named("other=tiny") == ("other", installed, None)
        assert _named(f"m={hermes_bundle}") == ("m", hermes_bundle, None)
        assert _named(str(hermes_bundle)) == (hermes_bundle.name, hermes_bundle, None)
    finally:
        shutil.rmtree(installed)
    with pytest.raises(UsageError, match="no folder"):
        _named(str(tmp_path / "none"))


def test_adapters_of_the_command(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx_adapter"
    file.write_bytes(b"")
    assert _adapters([f"one={file}", f"m:two={file}"], ["m"]) == {"m": {"one": file, "two": file}}
    for wrong in (f"one={file}", f"other:one={file}", "m:one", f"m:={file}", "m:one=", f"m:one={file}.gone"):
        with pytest.raises(UsageError):
            _adapters([wrong], ["m", "n"])
    with pytest.raises(UsageError, match="two adapters"):
        _adapters([f"one={file}"] * 2, ["m"])
