"""A bundle whose tokenizer holds a stranger's regular expression: a text costs seconds, and the model goes on."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path

import psutil
import pytest

from edgephi import load
from edgephi.bundle import describe_file, read_manifest, write_manifest
from edgephi.errors import EngineError, PromptError, TokenizerError
from edgephi.export.api import export_model
from tests.processes import children_that_run
from tests.tiny_phi import PHI_3, tiny_phi

WORD = chr(0x4E10)
LONG = ("a" * 4_000 + "!") * 50
"""200,000 characters, for which the pattern takes hours."""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """As a stranger would hand it over: the manifest says it is intact."""
    export_model(tiny_phi(tmp_path / "source", PHI_3), tmp_path / "bundle")
    folder = tmp_path / "bundle"
    step = {"type": "Replace", "pattern": {"Regex": r"\w*\w*(?=\s)"}, "content": "x"}
    change(folder, "normalizer", step)
    return folder


def change(folder: Path, part: str, value: object) -> None:
    path = folder / "tokenizer.json"
    parsed = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**parsed, part: value}, ensure_ascii=False), encoding="utf-8")
    manifest = read_manifest(folder)
    files = tuple(describe_file(folder, file.path) for file in manifest.files)
    write_manifest(folder, manifest.model_copy(update={"files": files}))


def children() -> list[psutil.Process]:
    gc.collect()
    return children_that_run("edgephi.tokenizer.child")


def test_a_text_is_refused_after_five_seconds_and_the_model_goes_on(bundle: Path) -> None:
    with load(bundle) as model:
        before = model.generate(WORD, max_new_tokens=2).result()
        started = time.monotonic()
        with pytest.raises(PromptError, match="takes more than 5 s for this text"):
            model.generate(LONG)
        assert 4 < time.monotonic() - started < 30
        assert model.generate(WORD, max_new_tokens=2).result().text == before.text
        assert len(children()) == 1
    assert not children()
    with pytest.raises(EngineError):
        model.generate(WORD)
    assert not children()


def test_a_load_that_fails_leaves_no_process(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise EngineError("no", remedy="-")

    monkeypatch.setattr("edgephi.runtime.engines.onnx.OnnxEngine", refuse)
    with pytest.raises(EngineError):
        load(bundle)
    assert not children()


def test_a_pattern_in_the_decoder_is_refused_at_load(bundle: Path) -> None:
    change(bundle, "decoder", {"type": "Replace", "pattern": {"Regex": r"\w*\w*(?=\s)"}, "content": "x"})
    with pytest.raises(TokenizerError, match="the decoder has a regular expression of its own"):
        load(bundle)
    assert not children()
