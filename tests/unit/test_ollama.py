"""`ollama:NAME` finds the weights Ollama has pulled, and says what is wrong when it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from edgephi.errors import SourceError, UnsupportedModelError
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.checkpoint.ollama import find_ollama_model
from edgephi.export.checkpoint.source import open_source
from edgephi.export.checkpoint.tensors import read_rows
from tests.unit.test_gguf_reader import write_llama

LIBRARY = "manifests/registry.ollama.ai/library"
MODEL = "application/vnd.ollama.image.model"


def put_blob(models: Path, content: bytes) -> dict[str, object]:
    """Store a blob as Ollama does; the layer that refers to it, without its media type."""
    digest = hashlib.sha256(content).hexdigest()
    (models / "blobs").mkdir(parents=True, exist_ok=True)
    (models / "blobs" / f"sha256-{digest}").write_bytes(content)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def put_manifest(models: Path, name: str, layers: object, **more: object) -> Path:
    path = models / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": layers, **more}))
    return path


@pytest.fixture
def weights(tmp_path: Path) -> bytes:
    write_llama(tmp_path / "m.gguf")
    return (tmp_path / "m.gguf").read_bytes()


@pytest.fixture
def models(tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with phi4-mini:latest, as `ollama pull` leaves it; the network is out of reach."""
    folder = tmp_path / "models"
    layers = [
        {"mediaType": MODEL, **put_blob(folder, weights)},
        {"mediaType": "application/vnd.ollama.image.template", **put_blob(folder, b"{{ .Prompt }}")},
        {"mediaType": "application/vnd.ollama.image.license", **put_blob(folder, b"MIT")},
    ]
    put_manifest(folder, f"{LIBRARY}/phi4-mini/latest", layers)
    monkeypatch.setenv("OLLAMA_MODELS", str(folder))

    def refuse(*_: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return folder


def model_layer(models: Path, weights: bytes) -> dict[str, object]:
    return {"mediaType": MODEL, **put_blob(models, weights)}


@pytest.mark.parametrize("source", ["ollama:phi4-mini", "ollama:phi4-mini:latest", "ollama:library/phi4-mini"])
def test_a_pulled_model_is_its_gguf_file(source: str, models: Path, weights: bytes, tmp_path: Path) -> None:
    checkpoint = open_source(source)
    digest = hashlib.sha256(weights).hexdigest()
    assert (checkpoint.kind, checkpoint.name) == ("gguf", "ollama:phi4-mini:latest")
    assert checkpoint.revision == f"sha256:{digest}"
    assert checkpoint.files == (models / "blobs" / f"sha256-{digest}",)
    plain = open_gguf(tmp_path / "m.gguf")
    assert checkpoint.config == plain.config
    for name, ref in plain.tensors.items():
        np.testing.assert_array_equal(read_rows(checkpoint.tensors[name], 0, 4), read_rows(ref, 0, 4))


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("ollama:phi4-mini:3.8b-q4_K_M", f"{LIBRARY}/phi4-mini/3.8b-q4_K_M"),
        ("ollama:me/phi4-mini", "manifests/registry.ollama.ai/me/phi4-mini/latest"),
        ("ollama:hf.co/bartowski/Phi-4-GGUF:Q4_K_M", "manifests/hf.co/bartowski/Phi-4-GGUF/Q4_K_M"),
        ("ollama:localhost:5000/me/phi:1", "manifests/localhost:5000/me/phi/1"),
        ("ollama:newer", "manifests-v2/ollama.com/library/newer/latest"),
    ],
)
def test_user_names_other_registries_and_tags(source: str, path: str, models: Path, weights: bytes) -> None:
    if os.name == "nt" and "localhost:" in path:
        pytest.skip("a colon cannot be in a file name here")
    put_manifest(models, path, [model_layer(models, weights)])
    checkpoint = open_source(source)
    assert checkpoint.name == (source if source.count(":") > 1 else f"{source}:latest")


def test_the_gguf_variant_is_taken_from_a_list_of_variants(models: Path, weights: bytes) -> None:
    child = json.dumps({"layers": [model_layer(models, weights)]}).encode()
    mlx = {"format": "safetensors", "runner": "mlx", "digest": "sha256:" + "0" * 64}
    gguf = {"format": "gguf", "runner": "ollama", **put_blob(models, child)}
    manifest = put_manifest(models, "manifests-v2/ollama.com/library/phi/latest", None, manifests=[mlx, gguf])
    assert find_ollama_model("ollama:phi").digest == f"sha256:{hashlib.sha256(weights).hexdigest()}"
    (models / "blobs" / str(gguf["digest"]).replace(":", "-")).write_bytes(child + b" ")
    with pytest.raises(SourceError, match="differs from its digest"):
        find_ollama_model("ollama:phi")
    manifest.write_text(json.dumps({"manifests": [mlx]}))
    with pytest.raises(UnsupportedModelError, match="no GGUF variant"):
        find_ollama_model("ollama:phi")


def test_a_model_that_is_not_pulled_is_answered_with_what_is(models: Path, weights: bytes) -> None:
    put_manifest(models, "manifests/hf.co/a/B/Q8_0", [model_layer(models, weights)])
    with pytest.raises(SourceError) as caught:
        open_source("ollama:phi5")
    assert "phi5:latest" in caught.value.what
    assert "hf.co/a/B:Q8_0, phi4-mini:latest" in caught.value.what
    assert "ollama pull phi5:latest" in caught.value.remedy


def test_without_ollama_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "none"))
    with pytest.raises(SourceError, match="it has nothing"):
        open_source("ollama:phi4-mini")


def test_without_the_variable_the_folder_is_in_the_users_home(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = models.parent / "home"
    (home / ".ollama").mkdir(parents=True)
    models.rename(home / ".ollama" / "models")
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(home))
    assert find_ollama_model("ollama:phi4-mini").file.is_relative_to(home)


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "a/../b", "x:../../y", "/etc/passwd", "a/b/c/d", "a\\b", "x:", ".hidden", "a.b/c", "a\0b", "é"],
)
def test_a_name_cannot_leave_the_folder(name: str, models: Path) -> None:
    with pytest.raises(SourceError, match="no name of an Ollama model"):
        open_source(f"ollama:{name}")


@pytest.mark.parametrize(
    "digest",
    ["sha256:../../m.gguf", "sha256:" + "a" * 63, "sha256:" + "g" * 64, "md5:" + "a" * 64, "", None, 5, ["sha256:"]],
)
def test_a_digest_that_is_none_is_an_error(digest: object, models: Path) -> None:
    put_manifest(models, f"{LIBRARY}/bad/latest", [{"mediaType": MODEL, "digest": digest, "size": 3}])
    with pytest.raises(SourceError, match="digest"):
        open_source("ollama:bad")


def test_missing_or_shortened_weights_are_an_error(models: Path, weights: bytes) -> None:
    blob = find_ollama_model("ollama:phi4-mini").file
    blob.write_bytes(weights[:-1])
    with pytest.raises(SourceError, match="the manifest says"):
        open_source("ollama:phi4-mini")
    blob.unlink()
    with pytest.raises(SourceError, match="missing"):
        open_source("ollama:phi4-mini")


@pytest.mark.parametrize("kind", ["adapter", "projector"])
def test_a_model_with_more_than_text_weights_is_refused(kind: str, models: Path, weights: bytes) -> None:
    other = {"mediaType": f"application/vnd.ollama.image.{kind}", **put_blob(models, b"x")}
    put_manifest(models, f"{LIBRARY}/two/latest", [model_layer(models, weights), other])
    with pytest.raises(UnsupportedModelError, match="two:latest"):
        open_source("ollama:two")


@pytest.mark.parametrize("count", [0, 2])
def test_anything_but_one_gguf_file_is_refused(count: int, models: Path, weights: bytes) -> None:
    put_manifest(models, f"{LIBRARY}/odd/latest", [model_layer(models, weights)] * count)
    with pytest.raises(UnsupportedModelError, match=f"{count} GGUF files"):
        open_source("ollama:odd")


DAMAGED = {
    "empty": "",
    "cut": "{",
    "list": "[]",
    "null": "null",
    "number": '{"layers": 5}',
    "numbers": '{"layers": [5]}',
    "no layers": "{}",
    "nested": "[" * 100_000,
    "large": " " * 5_000_000 + "{}",
    "no text": "\xff",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_manifest_is_an_error(case: str, models: Path) -> None:
    put_manifest(models, f"{LIBRARY}/bad/latest", []).write_bytes(DAMAGED[case].encode("latin-1"))
    with pytest.raises(SourceError, match="the manifest") as caught:
        open_source("ollama:bad")
    assert "ollama pull bad:latest" in caught.value.remedy


def test_a_folder_the_user_may_not_read_is_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        with pytest.raises(SourceError, match="cannot be read: Permission denied"):
            open_source("ollama:phi4-mini")
