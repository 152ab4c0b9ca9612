"""`edgephi chat`: its commands, and a person at a pseudo-terminal who stops answers, saves, and leaves."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import edgephi
from edgephi.commands.chat.slash_commands import Conversation
from edgephi.errors import PromptError
from edgephi.runtime.model import Model
from tests.tiny_phi import PHI_3, tiny_phi

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
CONTEXT = 2048
PROMPT, SENT = "\x1b[?2004h", "\x1b[?2004l"
"""What prompt_toolkit sends when it begins to read a message and when it has one: bracketed paste on and off."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny model that talks nonsense without end."""
    folder = tmp_path_factory.mktemp("chat")
    source = tiny_phi(folder / "source", PHI_3, CONTEXT, ascii_text=True)
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    edgephi.export(source, folder / "bundle", quantize="rtn", kv_cache="float")
    return folder / "bundle"


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with edgephi.load(bundle, "cpu") as loaded:
        yield loaded


@pytest.fixture
def talk(model: Model) -> Conversation:
    return Conversation(model, {"max_new_tokens": 6, "seed": 0}, None, terminal=True)


def roles(talk: Conversation) -> list[object]:
    return [message["role"] for message in talk._session.messages]


class TestCommands:
    def test_a_conversation_is_saved_and_goes_on(
        self, model: Model, talk: Conversation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "my talk.json"
        assert talk.take("/system Be brief.") and talk.take("Hello") and talk.take(f'/save "{file}"')
        saved = json.loads(file.read_text(encoding="utf-8"))
        assert [message["role"] for message in saved] == ["system", "user", "assistant"]
        assert talk.take("More") and talk.take("/save"), "its own file is replaced"
        assert len(json.loads(file.read_text(encoding="utf-8"))) == 5
        other = Conversation(model, {"max_new_tokens": 6}, None, terminal=True)
        capsys.readouterr()
        assert not other.take(f"/save {file}") and "already" in capsys.readouterr().err
        assert other.take(f"/load {file}") and other._session.messages == talk._session.messages
        resumed = Conversation(model, {}, None, terminal=False, resumed=(talk._session.messages, file))
        assert resumed._session.messages == talk._session.messages
        resumed._session.reset()
        assert roles(resumed) == ["system"], "the instructions of a file stay instructions"

    def test_messages_are_taken_back_and_answered_anew(
        self, talk: Conversation, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert not talk.take("/undo") and not talk.take("/retry")
        assert talk.take("Hello")
        first = talk._session.messages
        assert talk.take("/regenerate") and talk._session.messages == first, "greedy decoding gives the same"
        assert "With temperature 0" in capsys.readouterr().err
        assert talk.take("/retry 5") and talk._session.messages[:1] == first[:1]
        assert talk._session.messages != first
        assert talk.take("/undo") and roles(talk) == []
        capsys.readouterr()
        assert not talk.take("/retry") and "temperature" not in capsys.readouterr().err
        for line in ("/retry warm", "/retry -1", "/retry nan"):
            assert talk.take("Hello") and not talk.take(line)

    def test_stats_say_what_happened(self, talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
        assert talk.take("/stats"), "before the first answer too"
        assert talk.take("Hello") and talk.take("Again")
        capsys.readouterr()
        assert talk.take("/stats")
        shown = capsys.readouterr().out
        for name in ("messages", "last answer", "reused", "speed", "provider", "all prompts", "context left"):
            assert name in shown
        assert re.search(r"\| messages +\| 4 ", shown) and re.search(r"\| provider +\| cpu ", shown)
        assert f"of {CONTEXT:,} tokens" in shown

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("/rest", "There is no command /rest"),
            ("/help me", "/help takes nothing after it"),
            ("/load", "Name a file"),
            ("/save", "Name a file"),
            ("/load nowhere.json", "there is no such file"),
            ("/save nowhere/talk.json", "could not be written"),
            ("/save a\nb", "one line"),
        ],
    )
    def test_what_cannot_be_done_is_said_and_the_conversation_stays(
        self, line: str, reason: str, talk: Conversation, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert talk.take("Hello")
        before = talk._session.messages
        assert not talk.take(line)
        assert reason in capsys.readouterr().err and talk._session.messages == before

    def test_what_begins_with_a_slash_may_be_a_message(self, talk: Conversation) -> None:
        assert talk.take("/usr/bin is what?") and talk.take("/etc\nhosts")
        assert len(talk._session.messages) == 4

    def test_piped_lines_write_no_files(self, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        piped = Conversation(model, {"max_new_tokens": 2}, None, terminal=False)
        assert not piped.take(f"/save {tmp_path / 'x.json'}")
        assert "is for a terminal" in capsys.readouterr().err and not list(tmp_path.iterdir())
        assert piped.take("/help") and piped.take("/reset")

    def test_a_conversation_longer_than_the_context_is_refused_at_once(self, model: Model, tmp_path: Path) -> None:
        long = ({"role": "user", "content": "word " * 3_000}, {"role": "assistant", "content": "x"})
        with pytest.raises(PromptError, match="--resume cannot be used"):
            Conversation(model, {}, None, terminal=True, resumed=(long, tmp_path / "talk.json"))


class Terminal:
    """A process at a pseudo-terminal of its own."""

    def __init__(self, *words: object, state: Path) -> None:
        import pty

        self.master, slave = pty.openpty()
        environment = os.environ | {"EDGEPHI_STATE": str(state), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = [sys.executable, "-m", "edgephi", *map(str, words)]
        self.attributes = self._attributes()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, preexec_fn=_controlling
        )
        os.close(slave)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What is shown until the text is, which is then behind us."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.shown!r}"
            try:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"{text!r} did not come before the end: {self.shown!r}") from None
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def wait_for_more(self, characters: int) -> None:
        """Until so much more is shown."""
        while len(self.shown) < characters:
            assert select.select([self.master], [], [], 60)[0], "nothing is shown"
            self.shown += os.read(self.master, 65536).decode(errors="replace")

    def end(self) -> int:
        """The exit status; the terminal is as it was before."""
        status = self.process.wait(120)
        assert self._attributes() == self.attributes
        os.close(self.master)
        return status

    def _attributes(self) -> object:
        import termios

        return termios.tcgetattr(self.master)


def _controlling() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


Open = Callable[..., Terminal]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Open]:
    opened: list[Terminal] = []

    def start(bundle: Path, *options: object) -> Terminal:
        opened.append(Terminal("chat", bundle, *options, state=tmp_path / "state"))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
class TestAtATerminal:
    def test_an_answer_is_stopped_and_the_conversation_goes_on(
        self, terminal: Open, smollm2_bundle: Path, tmp_path: Path
    ) -> None:
        chat = terminal(smollm2_bundle, "--max-new-tokens", 1500)
        chat.wait_for("/help lists")
        chat.wait_for(PROMPT)
        # a paste of two lines is one message
        chat.type("\x1b[200~Tell me a very long story\nabout a lighthouse.\x1b[201~\r")
        chat.wait_for(SENT)
        chat.wait_for_more(40)  # the answer has begun
        chat.type("\x03")
        assert "cancelled" in chat.wait_for("cancelled")
        chat.wait_for(PROMPT)
        chat.type("/stats\r")
        chat.wait_for("messages")
        chat.wait_for("2")
        chat.type(f"/save {tmp_path / 'talk.json'}\r")
        chat.wait_for("Saved 2 messages")
        chat.wait_for(PROMPT)
        chat.type("\x04")
        assert chat.end() == 0
        said = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
        assert said[0]["content"] == "Tell me a very long story\nabout a lighthouse." and said[1]["content"]
        history = (tmp_path / "state" / "chat_history").read_text(encoding="utf-8")
        assert "+Tell me a very long story\n+about a lighthouse." in history

        again = terminal(smollm2_bundle, "--max-new-tokens", 3, "--resume", tmp_path / "talk.json", "--no-history")
        again.wait_for(PROMPT)
        again.type("/undo\r")
        again.wait_for("Taken back: Tell me")
        again.wait_for(PROMPT)
        again.type("\x03")
        again.wait_for("again, or Ctrl-D")
        again.wait_for(PROMPT)  # what is typed before, the terminal itself would take for a signal
        again.type("\x03")
        assert again.end() == 0
        assert (tmp_path / "state" / "chat_history").read_text(encoding="utf-8") == history

    def test_a_signal_at_the_prompt_leaves_the_terminal_as_it_was(self, terminal: Open, bundle: Path) -> None:
        chat = terminal(bundle, "--max-new-tokens", 3)
        chat.wait_for(PROMPT)
        chat.process.send_signal(signal.SIGTERM)
        chat.wait_for("error: terminated")
        assert chat.end() == 143

    def test_without_a_terminal_for_the_answers_lines_are_plain(self, bundle: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "edgephi", "chat", str(bundle), "--max-new-tokens", "2"],
            input="Hello\\\nthere\n/exit\n",
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0 and done.stderr.count("2 new") == 2, "a line is a message"
        assert "\x1b" not in done.stdout
