"""Strangers' files: read within bounds, links not followed outside, JSON that means one thing only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgephi.errors import BundleError, SourceError, printable
from edgephi.files import parse_json, read_file, read_json_object, read_text, require_inside


def refused(data: bytes | str, *, finite: bool = False) -> str:
    with pytest.raises(SourceError) as caught:
        parse_json(data, where="a.json", error=SourceError, remedy="Fetch it again", finite=finite)
    return str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "b": {"c": 1, "c": 2}}', '[{"c": 1, "d": 0, "c": 1}]', r'{"c": 1, "\u0063": 2}']
)
def test_a_key_that_stands_twice_is_refused_by_name(text: str) -> None:
    assert "the key 'c' stands twice" in refused(text)


def test_json_that_cannot_be_is_refused_with_a_reason() -> None:
    assert "line 2, column 1" in refused('{"a":\n}')
    assert "5,000 digits" in refused("1" * 5_000)
    assert "nested too deeply" in refused("[" * 200_000)
    assert "byte order mark" in refused(b"\xef\xbb\xbf{}")
    assert "byte order mark" in refused('{"a": 1}'.encode("utf-16"))
    assert "no UTF-8 at byte 6" in refused(b'{"a": \xff}')
    for text in (r'{"\ud800": 1}', r'[["a\uDFFFb"]]', r'"\ude00\ud83d"'):
        assert "half of a surrogate pair" in refused(text)
    assert parse_json(r'"\ud83d\ude00 \\ud800"', where="", error=SourceError, remedy="") == "\U0001f600 \\ud800"


def test_numbers_that_are_none_are_refused_where_they_may_not_be() -> None:
    for text in ('{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}'):
        refused(text, finite=True)
    assert parse_json('{"a": 1.5e10}', where="", error=SourceError, remedy="", finite=True) == {"a": 1.5e10}


def test_a_file_is_read_within_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'{"a": "\xc3\xa9\r\n"}'.replace(b"\r\n", b""))
    assert read_json_object(file, error=BundleError, remedy="") == {"a": "é"}
    assert read_text(file, limit=99, error=BundleError, remedy="") == '{"a": "é"}'
    with pytest.raises(BundleError, match="more than the 5"):
        read_file(file, limit=5, error=BundleError, remedy="Fetch it again")
    with pytest.raises(BundleError, match="no such file"):
        read_file(tmp_path / "b", limit=5, error=BundleError, remedy="Fetch it again")
    with pytest.raises(BundleError, match="no regular file"):
        read_file(tmp_path, limit=5, error=BundleError, remedy="Fetch it again")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_hang_its_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SourceError, match="no regular file"):
        read_json_object(tmp_path / "config.json", error=SourceError, remedy="")


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    with pytest.raises(SourceError, match="git lfs pull"):
        read_json_object(file, error=SourceError, remedy="")


def test_a_link_may_not_leave_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "real").write_text("x", encoding="utf-8")
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (folder / "inner").symlink_to("real")
    (folder / "outer").symlink_to(tmp_path / "secret")
    (folder / "circle").symlink_to("circle")
    require_inside(folder / "inner", folder, SourceError, "")
    for name in ("outer", "circle"):
        with pytest.raises(SourceError):
            require_inside(folder / name, folder, SourceError, "")


def test_the_hub_cache_is_a_folder_of_links_and_counts_as_one(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("{}", encoding="utf-8")
    (snapshot / "config.json").symlink_to(Path("../../blobs/1"))
    require_inside(snapshot / "config.json", snapshot, SourceError, "")


def test_messages_cannot_drive_a_terminal() -> None:
    error = SourceError("tensor \x1b[31m\u202eevil\n\x9b", where=Path("a\x07b"), remedy="Take\rit")
    assert str(error) == r"tensor \x1b[31m\u202eevil\n\x9b (a\x07b). Take\rit."
    assert printable("Größe 漢字 – ok") == "Größe 漢字 – ok"
