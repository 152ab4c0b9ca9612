"""A bundle that passed its examination is not examined again, and nothing else is skipped for it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import edgephi
from edgephi import contents
from edgephi.bundle import MANIFEST, read_manifest, sha256_of
from edgephi.errors import BundleError
from edgephi.runtime.loading import load
from edgephi.runtime.placement import examined as module
from edgephi.runtime.placement.examined import was_examined
from tests.tiny_phi import PHI_4_MINI, tiny_phi


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examined")
    edgephi.export(tiny_phi(folder / "checkpoint", PHI_4_MINI), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def forge(bundle: Path, name: str, data: bytes) -> None:
    """Replace a file, and have the manifest say so."""
    (bundle / name).write_bytes(data)
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"bytes": len(data), "sha256": sha256_of(bundle / name)}
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def test_the_second_load_reads_no_graph_for_what_it_names(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(bundle, "cpu").close()
    assert was_examined(read_manifest(bundle))

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a graph was examined")

    monkeypatch.setattr(contents, "check_graph", refuse)
    load(bundle, "cpu").close()
    with pytest.raises(AssertionError, match="examined"):
        load(bundle, "cpu", verify=True)


def test_a_bundle_that_is_refused_leaves_no_mark(bundle: Path) -> None:
    forge(bundle, "genai_config.json", b'{"model": {}, "model": {}}')
    for _ in range(2):
        with pytest.raises(BundleError, match="stands twice"):
            load(bundle, "cpu")
    assert not was_examined(read_manifest(bundle))


@pytest.mark.parametrize("name", ["model_rows.onnx", "tokenizer.json", "genai_config.json"])
def test_changed_bytes_are_found_in_spite_of_the_mark(bundle: Path, name: str) -> None:
    load(bundle, "cpu").close()
    path = bundle / name
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match="was changed"):
        load(bundle, "cpu")


def test_other_bytes_under_a_manifest_that_says_so_are_examined(bundle: Path) -> None:
    load(bundle, "cpu").close()
    forge(bundle, "tokenizer_config.json", b'{"a": 1, "a": 2}')
    with pytest.raises(BundleError, match="stands twice"):
        load(bundle, "cpu")


def test_a_file_beside_the_bundle_is_found_in_spite_of_the_mark(bundle: Path) -> None:
    load(bundle, "cpu").close()
    (bundle / "vocab.json").write_text("{}")
    with pytest.raises(BundleError, match="does not list"):
        load(bundle, "cpu")


def test_a_file_too_large_to_hash_is_examined_at_every_load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(bundle, "cpu").close()
    monkeypatch.setattr("edgephi.bundle.HASH_AT_LOAD_UP_TO", 0)
    path = bundle / "tokenizer_config.json"
    path.write_bytes(b'{"a": 1, "a": 2}'.ljust(path.stat().st_size))
    with pytest.raises(BundleError, match="stands twice"):
        load(bundle, "cpu")


def test_other_rules_make_the_mark_void(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(bundle, "cpu").close()
    manifest = read_manifest(bundle)
    assert was_examined(manifest)
    other = tmp_path / "rules"
    other.mkdir()
    for name in module.RULES:
        shutil.copy(Path(contents.__file__).with_name(name), other)
    monkeypatch.setattr(contents, "__file__", str(other / "contents.py"))
    assert was_examined(manifest)
    with (other / "graph_file.py").open("a") as stream:
        stream.write("# a rule\n")
    assert not was_examined(manifest)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner's number on this system")
def test_a_mark_of_another_user_is_not_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(bundle, "cpu").close()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not was_examined(read_manifest(bundle))


def test_marks_do_not_pile_up(bundle: Path, tmp_path: Path) -> None:
    marks = tmp_path / "cache" / "examined"
    marks.mkdir(parents=True)
    for index in range(module.KEPT + 5):
        (marks / f"{index:064x}").touch()
    load(bundle, "cpu").close()
    assert len(list(marks.iterdir())) == module.KEPT
    assert was_examined(read_manifest(bundle))


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path / "file"))
    load(bundle, "cpu").close()
    assert not was_examined(read_manifest(bundle))


def test_only_marks_are_removed_where_there_are_too_many(bundle: Path, tmp_path: Path) -> None:
    """EDGEPHI_CACHE may name a folder in which somebody keeps files in a folder of this name."""
    own = tmp_path / "cache" / "examined"
    own.mkdir(parents=True)
    for index in range(module.KEPT + 5):
        (own / f"report {index}.csv").write_text("mine")
    load(bundle, "cpu").close()
    assert len(list(own.glob("*.csv"))) == module.KEPT + 5
    assert was_examined(read_manifest(bundle))
