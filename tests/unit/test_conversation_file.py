"""A conversation as a file: written for this user alone, read with every fault named."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from edgephi.errors import OutputError, UsageError
from edgephi.runtime.conversation import read_conversation, write_conversation
from edgephi.runtime.text.templates import Message

MESSAGES: tuple[Message, ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße\n\x1b[31m"},
    {"role": "assistant", "content": "😀"},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    write_conversation(file, MESSAGES)
    assert read_conversation(file) == MESSAGES
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    if sys.platform != "win32":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_openais_form_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text('{"model": "x", "messages": [{"role": "user", "content": "Hi"}]}', encoding="utf-8")
    assert read_conversation(file) == ({"role": "user", "content": "Hi"},)


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="already"):
        write_conversation(file, MESSAGES)
    assert file.read_text(encoding="utf-8") == "mine"
    write_conversation(file, MESSAGES, replace=True)
    assert read_conversation(file) == MESSAGES


@pytest.mark.parametrize("name", ["none/talk.json", "x" * 300, "a\0b", "."])
def test_a_place_that_cannot_be_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write_conversation(tmp_path / name, MESSAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "malformed JSON"),
        ("{}", "no list of messages"),
        ("[1]", "message 1 is no object"),
        ('[{"role": "user", "content": "a"}, {"role": "root", "content": "a"}]', "message 2 has the role 'root'"),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]', "message 2 has the role 'system'"),
        ('[{"role": "user", "content": 1}]', "message 1 has no text"),
        ('[{"role": "user", "content": "\\ud800"}]', "surrogate"),
    ],
)
def test_anything_else_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=reason):
        read_conversation(tmp_path / "talk.json")
