"""Prepacked weights: written at the second load, mapped afterwards, never believed when anything about them changed.

The reference for what a prepacked model computes is the same bundle loaded as it is.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.errors import OutputError, UsageError
from edgephi.runtime.loading import load
from edgephi.runtime.prepacked import entries, packing
from edgephi.runtime.prepacked.entries import KEPT, RECORD
from edgephi.runtime.prepacked.packing import FILES, WEIGHTS, Prepacking
from tests.tiny_phi import PHI_4_MINI, TOKENS, tiny_phi

CONTEXT = 96  # of the short rope
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four-bit weights, an int8 head tied to the embedding, two ropes."""
    folder = tmp_path_factory.mktemp("prepacked")
    edgephi.export(tiny_phi(folder / "checkpoint", PHI_4_MINI, context=CONTEXT), folder / "bundle")
    return folder / "bundle"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEPHI_PREPACKED", raising=False)
    return tmp_path / "cache" / "prepacked"


def logits(bundle: Path, mode: Prepacking | None, tokens: int = 20) -> NDArray[np.float32]:
    """Of five greedy steps after a prompt."""
    rows = []

    def choose(row: NDArray[np.float32]) -> int:
        rows.append(row.copy())
        return int(row[:TOKENS].argmax())

    with load(bundle, "cpu", prepacked=mode) as model:
        sequence = model.open_sequence(tokens + 5)
        sequence.prefill([3 + index % (TOKENS - 3) for index in range(tokens)], lambda: False)
        for _ in range(5):
            sequence.step(choose)
    return np.stack(rows)


def why(bundle: Path, mode: Prepacking | None = None, *, verify: bool = False) -> str:
    with load(bundle, "cpu", prepacked=mode, verify=verify) as model:
        return model.prepacked.why


def entry_of(bundle: Path) -> Path:
    with load(bundle, "cpu", prepacked="now") as model:
        assert model.prepacked.folder is not None
        return model.prepacked.folder


def flip(path: Path, at: int) -> None:
    """Change one bit, and give the file the time of change that it had."""
    stat = path.stat()
    with path.open("rb+") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_second_load_writes_and_the_third_reads(bundle: Path, cache: Path) -> None:
    assert "first load" in why(bundle)
    assert not any(path.is_dir() for path in cache.iterdir())
    assert why(bundle) == "written by this load"
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    assert {path.name for path in entry.iterdir()} == FILES | {RECORD}
    assert why(bundle) == "found in the cache"


def test_a_first_load_of_long_ago_does_not_count(bundle: Path, cache: Path) -> None:
    why(bundle)
    (mark,) = cache.iterdir()
    os.utime(mark, (0, 0))
    assert "first load" in why(bundle)


def test_the_environment_decides_where_the_caller_does_not(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPHI_PREPACKED", "never")
    assert [why(bundle), why(bundle)] == ["not wanted"] * 2
    assert not cache.exists()
    assert why(bundle, "now") == "written by this load"
    monkeypatch.setenv("EDGEPHI_PREPACKED", "sometimes")
    with pytest.raises(UsageError, match="EDGEPHI_PREPACKED"):
        why(bundle)


@pytest.mark.parametrize("tokens", [20, CONTEXT - 3, CONTEXT + 40], ids=["short", "crossing", "long"])
def test_it_computes_the_same_on_both_sides_of_the_rope_switch(bundle: Path, tokens: int) -> None:
    plain = logits(bundle, "never", tokens)
    assert np.array_equal(logits(bundle, "now", tokens), plain)
    assert why(bundle) == "found in the cache"
    assert np.array_equal(logits(bundle, "auto", tokens), plain)


def test_placement_is_that_of_the_bundles_graph(bundle: Path) -> None:
    with load(bundle, "cpu", prepacked="never") as plain, load(bundle, "cpu", prepacked="now") as mapped:
        assert mapped.prepacked.folder is not None
        assert mapped.placement == plain.placement


DAMAGES = [(name, damage) for name in sorted(FILES | {RECORD}) for damage in ("flipped", "cut", "gone", "linked")]


# the record vouches for nothing by its place
@pytest.mark.parametrize(("name", "damage"), [one for one in DAMAGES if one != (RECORD, "linked")])
def test_a_damaged_entry_is_written_again(bundle: Path, tmp_path: Path, name: str, damage: str) -> None:
    path = entry_of(bundle) / name
    plain = logits(bundle, "never")
    if damage == "flipped":
        # of the record, a digit of a hash
        flip(path, path.read_bytes().index(b'"sha256"') + 12 if name == RECORD else path.stat().st_size // 2)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "gone":
        path.unlink()
    else:
        moved = shutil.move(path, tmp_path / name)
        try:
            path.symlink_to(moved)
        except OSError:
            pytest.skip("this user may not make links")
    assert why(bundle) == "written by this load"
    assert np.array_equal(logits(bundle, "auto"), plain)
    assert why(bundle) == "found in the cache"


def test_large_weights_are_hashed_when_they_were_touched(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "HASH_AT_LOAD_UP_TO", 0)
    weights = entry_of(bundle) / WEIGHTS
    hashed: list[str] = []
    real = entries.sha256_of
    monkeypatch.setattr(entries, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    assert (why(bundle), hashed) == ("found in the cache", [])
    os.utime(weights)  # as a backup does that brings it back
    assert (why(bundle), hashed) == ("found in the cache", [WEIGHTS])
    hashed.clear()
    assert (why(bundle), hashed) == ("found in the cache", [])
    assert why(bundle, verify=True) == "found in the cache"
    assert sorted(hashed) == sorted(FILES)
    flip(weights, 0)
    os.utime(weights)
    assert why(bundle) == "written by this load"


@pytest.mark.parametrize("changed", ["cpu_name", "cpu_features", "_version"])
def test_another_processor_or_runtime_has_an_entry_of_its_own(
    bundle: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = entry_of(bundle)
    other = {"cpu_name": lambda: "another", "cpu_features": lambda: frozenset(("asimd",)), "_version": lambda name: "9"}
    monkeypatch.setattr(entries, changed, other[changed])
    assert "first load" in why(bundle)
    assert entry_of(bundle) != mine


def test_an_entry_goes_when_its_bundle_is_replaced(bundle: Path, tmp_path: Path, cache: Path) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    first = entry_of(place)
    shutil.rmtree(place)
    edgephi.export(tiny_phi(tmp_path / "checkpoint", PHI_4_MINI, context=CONTEXT, seed=1), place)
    second = entry_of(place)
    assert (first.exists(), second.exists()) == (False, True)
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_the_cache_keeps_the_bundles_that_were_used_last(bundle: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    for index in range(KEPT + 2):
        (cache / f"{index}").mkdir()
        (cache / f"{index}" / RECORD).write_text("{}")
        os.utime(cache / f"{index}" / RECORD, (index + 1, index + 1))
    entry = entry_of(bundle)
    kept = {path.name for path in cache.iterdir() if path.is_dir()}
    assert kept == {entry.name, *(f"{index}" for index in range(KEPT + 2)[-(KEPT - 1) :])}


def test_a_full_disk_is_no_reason_not_to_load(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 2**30 - 1000, 1000))
    why(bundle)
    assert "GB are needed" in why(bundle)
    with pytest.raises(OutputError, match="EDGEPHI_CACHE"):
        why(bundle, "now")
    assert not any(path.is_dir() for path in cache.iterdir())


def test_a_cache_that_cannot_be_made_is_no_reason_not_to_load(bundle: Path, cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file in its place")
    assert [why(bundle), why(bundle)] == ["the first load; the second one writes it"] * 2
    with pytest.raises(OutputError):
        why(bundle, "now")


def test_whoever_comes_second_takes_the_entry_that_is_there(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = entry_of(bundle)
    aside = cache.parent / "aside"
    theirs.rename(aside)
    real = packing.pack

    def while_another_finishes(graph: Path, target: Path, *, kleidiai: bool) -> bool:
        sound = real(graph, target, kleidiai=kleidiai)
        aside.rename(theirs)
        return sound

    monkeypatch.setattr(packing, "pack", while_another_finishes)
    inode = (aside / WEIGHTS).stat().st_ino
    assert entry_of(bundle) == theirs
    assert (theirs / WEIGHTS).stat().st_ino == inode
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [theirs.name]


def test_float_weights_are_left_alone(tmp_path: Path, cache: Path) -> None:
    edgephi.export(tiny_phi(tmp_path / "checkpoint", PHI_4_MINI), tmp_path / "bundle", precision="fp32")
    assert "float" in why(tmp_path / "bundle", "now")
    assert not cache.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows says of a name that is too long that it is not there")
def test_a_cache_that_the_system_does_not_look_into_costs_nothing_else(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPHI_CACHE", f"/{'x' * 300}")
    for _ in range(2):
        with load(bundle, "cpu", prepacked="auto") as model:
            assert model.prepacked.folder is None
            assert model.prefill.by == "blocks"
    with pytest.raises(OutputError):
        load(bundle, "cpu", prepacked="now")
