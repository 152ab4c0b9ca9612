"""Prefixes that cannot be kept say so, and what is saved leaves nothing behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgephi
from edgephi.errors import OutputError, UsageError
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from tests.tiny_phi import PHI_3, tiny_phi

SYSTEM = "".join(chr(0x4E00 + token) for token in range(3, 50))
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefixes")
    source = tiny_phi(folder / "source", PHI_3, 256)
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    edgephi.export(source, folder / "bundle", precision="fp32")
    return folder / "bundle"


@pytest.fixture
def model(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path))
    with load(bundle, threads=1) as loaded:
        yield loaded


def test_a_prefix_that_no_answer_would_find_is_refused(bundle: Path, model: Model) -> None:
    with load(bundle, threads=1, prefix_cache_bytes=0) as forgetful, pytest.raises(UsageError, match="loaded with"):
        forgetful.prefix(SYSTEM)
    with model.prefix(SYSTEM) as prefix:
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "三"}]
        assert model.chat(asked, max_new_tokens=1).result().reused_tokens >= len(SYSTEM) - 1
        assert len(prefix.tokens) >= len(SYSTEM)


def test_a_prefix_is_let_go_after_its_model_was_closed(bundle: Path) -> None:
    with load(bundle, threads=1) as model:
        prefix = model.prefix(SYSTEM)
    prefix.close()


def test_a_file_in_the_folders_place_is_an_error_of_ours(model: Model, tmp_path: Path) -> None:
    (tmp_path / "prefixes").write_text("not a folder")
    with pytest.raises(OutputError, match="cache folder cannot be used"):
        model.prefix(SYSTEM, saved=True)


def test_what_was_never_written_whole_is_deleted(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is somebody's text."""

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", interrupted)
        model.prefix(SYSTEM, saved=True)
    assert not any((tmp_path / "prefixes").iterdir())
    killed, writing = (tmp_path / "prefixes" / f".{name}.kv.safetensors.1.new" for name in "ab")
    for file in (killed, writing):
        file.write_bytes(b"somebody's text")
    os.utime(killed, (time.time() - 7200,) * 2)
    model.prefix(SYSTEM, saved=True).close()
    assert not killed.exists()
    assert writing.exists(), "another process may be at it"
