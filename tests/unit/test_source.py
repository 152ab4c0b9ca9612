"""SOURCE as a person writes it: what it names is found out from what lies there, and what cannot be is a sentence."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edgephi.errors import EdgephiError, SourceError, UsageError
from edgephi.export.checkpoint.source import open_source
from tests.unit.test_gguf_reader import write_llama


@pytest.mark.parametrize("name", ["weights", "sha256-0123", "model.gguf.part", "MODEL.GGUF", "x.bin"])
def test_a_gguf_file_is_known_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").rename(tmp_path / name)
    assert open_source(str(tmp_path / name)).kind == "gguf"


@pytest.mark.parametrize("what", ["folder", "file", "ollama"])
def test_a_revision_belongs_to_a_hub_id(what: str, fixtures: Path, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    named = {"folder": str(fixtures / "llama-tied"), "file": str(tmp_path / "m.gguf"), "ollama": "ollama:phi"}[what]
    with pytest.raises(UsageError, match="revision") as caught:
        open_source(named, "main")
    assert caught.value.remedy


def test_a_single_file_of_a_folder_names_the_folder(fixtures: Path) -> None:
    for file in ("model.safetensors", "config.json"):
        with pytest.raises(SourceError) as caught:
            open_source(str(fixtures / "llama-tied" / file))
        assert str(fixtures / "llama-tied") in caught.value.remedy


def test_a_pointer_in_place_of_the_gguf_file_is_named(tmp_path: Path) -> None:
    for name in ("m.gguf", "m"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(SourceError, match="git lfs pull"):
            open_source(str(tmp_path / name))


@pytest.mark.parametrize(
    "name",
    ["a\0b", "x" * 5000, "a/" * 3000, "", ".", "..", "a--b/c", "org/name.git", "org/../x", "a b/c", "config.json/x",
     "\x1b[31m/x", "é/ü", "https://huggingface.co/microsoft/phi-2", "C:\\models\\phi", "~/phi"],
)  # fmt: skip
def test_nothing_of_that_name_is_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EdgephiError) as caught:
        open_source(name)
    assert caught.value.remedy and "\x1b" not in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes in a folder")
def test_neither_file_nor_folder_is_a_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "loop"):
        with pytest.raises(SourceError):
            open_source(str(tmp_path / name))
    folder = tmp_path / "c"
    folder.mkdir()
    os.mkfifo(folder / "config.json")
    with pytest.raises(SourceError):
        open_source(str(folder))


@pytest.mark.parametrize(
    "error", [OSError(28, "disk full"), RuntimeError("odd"), ValueError("x\nAuthorization: secret")]
)
def test_what_the_hubs_client_raises_is_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError, match="the download failed") as caught:
        open_source("microsoft/phi-2")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("https://huggingface.co/microsoft/Phi-4-mini-instruct", "Write microsoft/Phi-4-mini-instruct."),
        ("http://www.huggingface.co/microsoft/phi-2/?x=1", "Write microsoft/phi-2."),
        ("huggingface.co/microsoft/phi-2#use", "Write microsoft/phi-2."),
        ("https://hf.co/microsoft/phi-2/tree/main", "Write microsoft/phi-2."),
        (
            "https://huggingface.co/microsoft/phi-2/blob/abc12/config.json",
            "Write microsoft/phi-2 with --revision abc12.",
        ),
        ("hf://microsoft/phi-2", "Write microsoft/phi-2."),
        ("https://ollama.com/library/phi4-mini:3.8b", "ollama:phi4-mini:3.8b."),
        ("https://example.org/model.gguf", "Download it yourself"),
    ],
)
def test_the_address_of_a_page_names_the_hub_id(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="address") as raised:
        open_source(name)
    assert remedy in str(raised.value)
