"""What is typed at the prompt of `edgephi chat` becomes a message: editing, several lines, pastes, history."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgephi.commands.chat import history as chat_history
from edgephi.commands.chat.editor import CommandCompleter, Editor
from edgephi.commands.chat.history import history_file, prepare_history
from edgephi.errors import OutputError

ALT_ENTER, CTRL_C, CTRL_D, UP, ENTER = "\x1b\r", "\x03", "\x04", "\x1b[A", "\r"
Type = Callable[..., list[str | None]]


@pytest.fixture
def typed() -> Iterator[Type]:
    """The messages that come of keys; each text is what is typed for one of them."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):

        def type_(*texts: str, history: Path | None = None) -> list[str | None]:
            editor, found = Editor(history), []
            for text in texts:
                pipe.send_text(text)
                found.append(editor.read())
            return found

        yield type_


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("Hello\r", "Hello"),
        ("  Hello  \r", "Hello"),
        ("\r", ""),
        ("one\\\rtwo\r", "one\ntwo"),
        (f"one{ALT_ENTER}two\r", "one\ntwo"),
        ("\x1b[200~one\r\ntwo\nthree\n\x1b[201~\r", "one\ntwo\nthree"),
        ("C:\\\x1b[D\r", "C:\\"),
        ("ab\x7fc\r", "ac"),
        ("world\x01Hello \r", "Hello world"),
    ],
    ids=["enter", "stripped", "empty", "backslash", "alt-enter", "paste", "not at the end", "backspace", "home"],
)
def test_keys_become_a_message(keys: str, message: str, typed: Type) -> None:
    assert typed(keys) == [message]


def test_ctrl_d_and_a_second_ctrl_c_leave(typed: Type) -> None:
    assert typed(f"half a message{CTRL_C}{CTRL_C}", CTRL_D) == [None, None]


def test_the_first_ctrl_c_forgets_the_line(typed: Type) -> None:
    assert typed(f"half a message{CTRL_C}another{ENTER}", CTRL_D) == ["another", None]


def test_earlier_messages_come_back_in_this_chat_and_in_the_next(typed: Type, tmp_path: Path) -> None:
    kept = prepare_history(tmp_path / "state" / "chat_history")
    assert typed("one\\\rtwo\r", f"{UP}{UP}\r", history=kept) == ["one\ntwo", "one\ntwo"]
    assert typed(f"{UP}!\r", history=kept) == ["one\ntwo!"]
    assert typed("secret\r", f"{UP}\r") == ["secret", "secret"]
    assert "secret" not in kept.read_text(encoding="utf-8"), "without a file they are gone with the chat"


@pytest.mark.skipif(sys.platform == "win32", reason="on Windows the user's folders are the user's alone")
def test_only_the_user_may_read_the_history(tmp_path: Path) -> None:
    file = tmp_path / "state" / "chat_history"
    prepare_history(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    assert stat.S_IMODE(prepare_history(file).stat().st_mode) == 0o600


def test_the_history_does_not_grow_without_end(typed: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chat_history"
    monkeypatch.setattr(chat_history, "LARGEST", 400)
    for number in range(30):
        typed(f"message {number}\r", history=prepare_history(file))
    assert file.stat().st_size < 500
    assert typed(f"{UP}\r", history=prepare_history(file)) == ["message 29"]


def test_a_history_that_cannot_be_kept_is_said(typed: Type, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="--no-history"):
        prepare_history(tmp_path / "file" / "chat_history")
    # it was there, and no longer is: the conversation goes on
    file = prepare_history(tmp_path / "state" / "chat_history")
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        editor = Editor(file)
        file.unlink()
        file.mkdir()
        pipe.send_text("Hello\r")
        assert editor.read() == "Hello"
        assert "--no-history" in (editor.history_problem() or "")
        assert editor.history_problem() is None, "said once"


def test_where_the_history_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEPHI_STATE", str(tmp_path))
    assert history_file() == tmp_path / "chat_history"
    monkeypatch.delenv("EDGEPHI_STATE")
    assert history_file().is_absolute() and "edgephi" in history_file().parts[-2]


def test_commands_and_their_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offered(text: str) -> list[str]:
        return [one.text for one in CommandCompleter().get_completions(Document(text, len(text)), CompleteEvent())]

    (tmp_path / "talk.json").touch()
    monkeypatch.chdir(tmp_path)
    assert offered("/s") == ["/stats", "/system", "/save"]
    assert offered("/load ta") == ["lk.json"]
    assert not offered("Hello /s") and not offered("/help ") and not offered("one\n/s")
    assert "/help" in offered("/")
