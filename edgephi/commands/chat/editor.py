"""The line that is typed at a terminal: editing, history, several lines, completion. By prompt_toolkit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from edgephi.commands.chat.slash_commands import COMMANDS
from edgephi.commands.terminal.console import stderr
from edgephi.errors import printable
from edgephi.files import said

CONTINUES = "\\"
"""At the end of a line: the message goes on in the next one."""


class Editor:
    """Reads one message after another.

    Args:
        history: file of `history.prepare_history`; None: messages are remembered until the end of the chat.
    """

    def __init__(self, history: Path | None) -> None:
        self._history = None if history is None else KeptHistory(history)
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            completer=CommandCompleter(),
            complete_while_typing=True,
            history=self._history or InMemoryHistory(),
            enable_history_search=False,
        )

    def read(self) -> str | None:
        """The next message, stripped; None on Ctrl-D in an empty line, and on a second Ctrl-C.

        The first Ctrl-C only forgets the line: it may have been meant for an answer that has just ended.
        """
        warned = False
        while True:
            try:
                return self._session.prompt().strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if warned:
                    return None
                warned = True
                stderr().print("Ctrl-C again, or Ctrl-D, ends the chat.", style="dim")

    def history_problem(self) -> str | None:
        """Why messages are no longer kept in the file, said once."""
        if self._history is None or self._history.problem is None:
            return None
        problem, self._history.problem = self._history.problem, None
        return f"The history cannot be kept: {printable(said(problem))}. --no-history keeps none."


class KeptHistory(FileHistory):
    """A full disk does not end the conversation."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.problem: OSError | None = None

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError as problem:
            self.problem = problem
            return []

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError as problem:
            self.problem = problem


class CommandCompleter(Completer):
    """Commands at the beginning of a message, and the files they take."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in document.text:
            return
        name, space, rest = text.partition(" ")
        if not space:
            for command in COMMANDS:
                if command.name.startswith(name):
                    yield Completion(command.name, start_position=-len(name), display_meta=command.about)
        elif any(command.name == name and command.takes == "FILE" for command in COMMANDS):
            yield from self._paths.get_completions(Document(rest, len(rest)), complete_event)


def _keys() -> KeyBindings:
    """Enter sends; with a backslash before it, and Alt-Enter, begin a new line. A paste keeps its line breaks."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith(CONTINUES):
            buffer.delete_before_cursor(len(CONTINUES))
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
