"""The CPU's engine is opened beside the caller, and whatever goes wrong on either side ends with nothing open."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import edgephi
from edgephi.errors import EngineError, TokenizerError
from edgephi.runtime.engines import onnx
from edgephi.runtime.loading import load
from tests.tiny_phi import PHI_4_MINI, tiny_phi


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opening")
    edgephi.export(tiny_phi(folder / "checkpoint", PHI_4_MINI), folder / "bundle")
    return folder / "bundle"


def test_the_session_is_made_while_the_tokenizer_is_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, real = threading.Event(), onnx.open_engine

    def open_engine(request: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        assert reading.wait(30), "the tokenizer waited for the engine"
        return real(request)

    def tokenizer(folder: Path) -> Any:
        reading.set()
        return SimpleNamespace(close=lambda: None, control=())

    monkeypatch.setattr(onnx, "open_engine", open_engine)
    monkeypatch.setattr("edgephi.runtime.model.Tokenizer", tokenizer)
    load(bundle, "cpu").close()


def test_an_error_of_the_engine_is_the_load_s(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: Any) -> Any:
        raise EngineError("no", remedy="None")

    monkeypatch.setattr(onnx, "open_engine", refuse)
    with pytest.raises(EngineError, match="no"):
        load(bundle, "cpu")
    assert not [thread for thread in threading.enumerate() if thread.name == "edgephi-open"]


@pytest.mark.parametrize("error", [TokenizerError("broken", remedy="None"), KeyboardInterrupt()])
def test_an_engine_that_nobody_waits_for_is_closed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    opened, real = [], onnx.open_engine

    def open_engine(request: Any) -> Any:
        opened.append(real(request))
        return opened[-1]

    def refuse(folder: Path) -> Any:
        raise error

    monkeypatch.setattr(onnx, "open_engine", open_engine)
    monkeypatch.setattr("edgephi.runtime.model.Tokenizer", refuse)
    with pytest.raises(type(error)):
        load(bundle, "cpu")
    with pytest.raises(EngineError, match="closed"):
        opened[0].require_open()
    assert not [thread for thread in threading.enumerate() if thread.name == "edgephi-open"]


def test_where_no_thread_can_be_started_the_caller_opens_the_engine(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "edgephi-open":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with load(bundle, "cpu") as model:
        assert model.generate("a", max_new_tokens=1).result().new_tokens == 1


@pytest.mark.parametrize("where", ["start", "join"])
def test_an_engine_is_closed_when_ctrl_c_strikes_while_its_thread_begins_or_is_waited_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    opened, may_open, real, real_step = [], threading.Event(), onnx.open_engine, getattr(threading.Thread, where)

    def open_engine(request: Any) -> Any:
        assert may_open.wait(30)
        opened.append(real(request))
        return opened[-1]

    def step(thread: threading.Thread, *given: Any) -> None:
        if thread.name != "edgephi-open":
            real_step(thread, *given)
            return
        if where == "start":
            real_step(thread)
            may_open.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "open_engine", open_engine)
    monkeypatch.setattr(threading.Thread, where, step)
    with pytest.raises(KeyboardInterrupt):
        load(bundle, "cpu")
    monkeypatch.undo()
    may_open.set()
    for thread in threading.enumerate():
        if thread.name == "edgephi-open":
            thread.join(30)
    with pytest.raises(EngineError, match="closed"):
        opened[0].require_open()


def test_the_tokenizer_s_error_wins_and_the_engine_s_leaves_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: Any) -> Any:
        raise MemoryError

    def broken(folder: Path) -> Any:
        raise TokenizerError("broken", remedy="None")

    monkeypatch.setattr(onnx, "open_engine", refuse)
    monkeypatch.setattr("edgephi.runtime.model.Tokenizer", broken)
    with pytest.raises(TokenizerError):
        load(bundle, "cpu")
    assert not [thread for thread in threading.enumerate() if thread.name == "edgephi-open"]
