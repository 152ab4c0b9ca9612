"""Prepacked weights stand for bytes that were read: a damaged or forged copy neither gives nor takes an entry."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgephi.bundle import MANIFEST
from edgephi.errors import BundleError
from edgephi.runtime.prepacked import entries, packing
from tests.unit.test_prepacked import bundle as bundle  # fixtures
from tests.unit.test_prepacked import cache as cache
from tests.unit.test_prepacked import entry_of, flip, logits, why

DATA = "model.onnx.data"


@pytest.fixture(autouse=True)
def large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's weights are hashed at every load; here they are left to `verify`, as gigabytes are."""
    monkeypatch.setattr("edgephi.bundle.HASH_AT_LOAD_UP_TO", 100_000)
    monkeypatch.setattr(entries, "HASH_AT_LOAD_UP_TO", 100_000)


def damaged(bundle: Path, folder: Path) -> Path:
    """A copy under the same manifest with one other byte in its weights, and the times of the original."""
    shutil.copytree(bundle, folder)
    assert (folder / DATA).stat().st_size > 100_000
    flip(folder / DATA, 5000)
    return folder


def test_a_damaged_copy_writes_no_entry(bundle: Path, tmp_path: Path, cache: Path) -> None:
    plain = logits(bundle, "never")
    copy = damaged(bundle, tmp_path / "copy")
    assert "first load" in why(copy)
    for mode in ("auto", "now"):
        with pytest.raises(BundleError, match="was changed"):
            why(copy, mode)  # type: ignore[arg-type]
    assert not any(path.is_dir() for path in cache.iterdir())
    assert why(bundle, "now") == "written by this load"
    assert np.array_equal(logits(bundle, "auto"), plain)


def test_a_damaged_copy_takes_no_entry(bundle: Path, tmp_path: Path) -> None:
    entry = entry_of(bundle)
    copy = damaged(bundle, tmp_path / "copy")
    with pytest.raises(BundleError, match=r"was changed.*model\.onnx\.data"):
        why(copy)
    assert why(bundle) == "found in the cache"
    assert entry.is_dir()


def test_damage_after_the_entry_was_written_is_found(bundle: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(bundle, tmp_path / "mine"))
    entry_of(mine)
    flip(mine / DATA, 5000)  # its time of writing is put back
    with pytest.raises(BundleError, match="was changed"):
        why(mine)


def test_an_intact_copy_is_hashed_once(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_of(bundle)
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    hashed: list[Path] = []
    real = entries.sha256_of
    monkeypatch.setattr(entries, "sha256_of", lambda path: hashed.append(path) or real(path))
    assert [why(copy), why(copy), why(bundle)] == ["found in the cache"] * 3
    assert [path for path in hashed if path.name == DATA] == [copy / DATA]
    os.utime(copy / DATA)
    assert why(copy) == "found in the cache"
    assert len([path for path in hashed if path.name == DATA]) == 2


def test_weights_that_change_while_they_are_packed_are_not_kept(
    bundle: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Path(shutil.copytree(bundle, tmp_path / "mine"))
    real = packing.pack

    def meanwhile(graph: Path, target: Path, *, kleidiai: bool) -> None:
        flip(mine / DATA, 5000)
        real(graph, target, kleidiai=kleidiai)

    monkeypatch.setattr(packing, "pack", meanwhile)
    with pytest.raises(BundleError, match="was changed"):
        why(mine, "now")
    assert not any(path.is_dir() for path in cache.iterdir())


def test_an_entry_of_an_earlier_version_is_not_used(bundle: Path, cache: Path) -> None:
    """It was keyed by what a manifest claimed; whatever lies there is poison or chance."""
    entry = entry_of(bundle)
    record = (entry / entries.RECORD).read_text(encoding="utf-8")
    (entry / entries.RECORD).write_text(record.replace('"copies"', '"of_before"'), encoding="utf-8")
    assert why(bundle) == "written by this load"
    assert (bundle / MANIFEST).is_file()
