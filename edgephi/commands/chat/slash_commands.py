"""What a conversation in the terminal understands besides messages: /help, /stats, /save and the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgephi.errors import OutputError, PromptError, UsageError, printable_lines

if TYPE_CHECKING:
    from edgephi.runtime.answer import Answer
    from edgephi.runtime.model import Model
    from edgephi.runtime.sampling import SamplingOptions
    from edgephi.runtime.stream import Stream
    from edgephi.runtime.text.templates import Message

# "/usr/bin is what?" is a message; one word alone is a command that was mistyped
_COMMAND = re.compile(r"/[A-Za-z]\w*")


@dataclass(frozen=True)
class Command:
    """A word that begins with a slash."""

    name: str
    takes: Literal["", "FILE", "[TEXT]", "[TEMPERATURE]"]
    about: str
    piped: bool = False
    """Whether it is understood where messages are piped in: those may be a stranger's, and write no files."""


COMMANDS = (
    Command("/help", "", "lists the commands", piped=True),
    Command("/stats", "", "shows tokens, speed, and what is left of the context"),
    Command("/regenerate", "[TEMPERATURE]", "answers the last message anew; /retry for short"),
    Command("/undo", "", "takes back the last message and its answer"),
    Command("/system", "[TEXT]", "shows the instructions, or sets them"),
    Command("/save", "FILE", "writes the conversation to a file"),
    Command("/load", "FILE", "goes on with the conversation of a file"),
    Command("/reset", "", "forgets the conversation", piped=True),
    Command("/exit", "", "ends the chat", piped=True),
)
ALIASES = {"/retry": "/regenerate", "/quit": "/exit"}
_SHOWN = 60
"""Characters of a message that is taken back."""
KEYS = (
    "Enter sends; Alt-Enter, or a backslash and Enter, begin a new line.",
    "Ctrl-C stops an answer, which stays as far as it went; at the prompt Ctrl-C twice, or Ctrl-D, ends the chat.",
)


@dataclass(frozen=True)
class Totals:
    """Of all answers of a chat."""

    answers: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0

    def plus(self, answer: Answer) -> Totals:
        return Totals(
            self.answers + 1,
            self.prompt_tokens + answer.prompt_tokens,
            self.reused_tokens + answer.reused_tokens,
            self.new_tokens + answer.new_tokens,
        )


class Conversation:
    """A session, and what its commands need to know about it.

    Args:
        system: the instructions; those of `resumed` otherwise.
        terminal: whether a person types; otherwise lines are piped in.
        resumed: messages to go on with, and the file they come from.
        adapter: of the model's, by name, for every answer.

    Raises:
        PromptError: no message can be answered: there is no chat template, or it refuses the instructions or what is
            resumed.
    """

    def __init__(
        self,
        model: Model,
        sampling: SamplingOptions,
        system: str | None,
        *,
        terminal: bool,
        resumed: tuple[tuple[Message, ...], Path] | None = None,
        adapter: str | None = None,
    ) -> None:
        self._model, self._sampling, self._terminal, self._adapter = model, sampling, terminal, adapter
        self._last: Answer | None = None
        self._totals = Totals()
        self._regenerated = 0
        messages: tuple[Message, ...] = ()
        self._file: Path | None = None
        if resumed is not None:
            messages, self._file = resumed
        instructions, said = _apart(messages)
        self._system = instructions if system is None else system
        _require_answerable(model, system, (), "--system")
        if resumed is not None:
            _require_answerable(model, self._system, said, "--resume")
        self._session = model.session(system=self._system, messages=said, adapter=adapter, **sampling)
        self._commands: dict[str, Callable[[str], bool]] = {
            "/help": self._help,
            "/stats": self._stats,
            "/regenerate": self._regenerate,
            "/undo": self._undo,
            "/system": self._set_system,
            "/save": self._save,
            "/load": self._load,
            "/reset": self._reset,
        }

    def take(self, line: str) -> bool:
        """Answer a message, or do what a command says, and print what comes of it.

        Returns:
            Whether it could be done. A message that is refused does not enter the conversation.

        Raises:
            EdgephiError: the model cannot go on.
        """
        if (found := parse_command(line)) is None:
            return self._answer(lambda: self._session.say(line))
        command, argument = found
        if command is None:
            return _refused(f"There is no command {line}. {self._known()}")
        if not self._terminal and not command.piped:
            return _refused(f"{command.name} is for a terminal: lines that are piped in are messages.")
        if argument and not command.takes:
            return _refused(f"{command.name} takes nothing after it.")
        try:
            return self._commands[command.name](argument)
        except (PromptError, UsageError, OutputError) as error:
            return _refused(str(error))

    def _answer(self, ask: Callable[[], Stream]) -> bool:
        """Print an answer; False: the message was refused, and the conversation goes on without it."""
        from edgephi.commands.terminal.console import print_statistics, print_stream

        try:
            answer = print_stream(ask())
        except PromptError as error:
            return _refused(str(error))
        except KeyboardInterrupt:  # before the answer began, or when it had just ended
            if not self._terminal:
                raise
            _note("stopped")
            return True
        self._last, self._totals = answer, self._totals.plus(answer)
        print_statistics(answer)
        return True

    def _help(self, argument: str) -> bool:
        if not self._terminal:
            _note(self._known())
            return True
        for command in COMMANDS:
            _note(f"  {f'{command.name} {command.takes}':<26}{command.about}")
        for line in KEYS:
            _note(line)
        return True

    def _known(self) -> str:
        if self._terminal:
            return "/help lists the commands."
        return f"{', '.join(f'{command.name} {command.about}' for command in COMMANDS if command.piped)}."

    def _stats(self, argument: str) -> bool:
        from edgephi.commands.terminal.tables import print_facts

        last, totals = self._last, self._totals
        try:
            left = f"{self._model.context_left(self._session):,} of {self._model.context_length:,} tokens"
        except PromptError:  # there are only instructions yet, which not every template renders alone
            left = f"nearly all of {self._model.context_length:,} tokens"
        facts = [("messages", str(len(self._session.messages)))]
        if last is not None:
            rate = last.decode_tokens_per_s
            facts += [
                ("last answer", f"{last.new_tokens:,} tokens, {last.prompt_tokens:,} of the prompt"),
                ("reused", f"{last.reused_tokens:,} tokens of that prompt were in the KV cache"),
                ("speed", "one token is too short to say" if rate is None else f"{rate:,.1f} tokens/s"),
                ("provider", last.provider if last.provider == last.prefill_provider else _providers(last)),
            ]
        facts += [
            ("all answers", f"{totals.new_tokens:,} tokens, in {totals.answers:,}"),
            ("all prompts", f"{totals.prompt_tokens:,} tokens, {totals.reused_tokens:,} of them reused"),
            ("context left", left),
        ]
        print_facts(facts)
        return True

    def _regenerate(self, argument: str) -> bool:
        sampling: SamplingOptions = {}
        temperature = self._sampling.get("temperature", 0.0)
        if argument:
            try:
                sampling["temperature"] = temperature = float(argument)
            except ValueError:
                return _refused("The temperature is a number, as in /regenerate 0.8.")
        seed = self._sampling.get("seed")
        self._regenerated += 1
        if seed is not None:  # the same one would give the same answer
            sampling["seed"] = seed + self._regenerated
        something = bool(_apart(self._session.messages)[1])
        if temperature == 0 and something and self._last is not None and self._last.finish != "cancelled":
            _note("With temperature 0 the same answer comes again; /regenerate 0.8 varies it.")
        return self._answer(lambda: self._session.regenerate(**sampling))

    def _undo(self, argument: str) -> bool:
        taken = self._session.undo()
        if taken is None:
            return _refused("There is no message to take back.")
        first, *more = taken.splitlines() or [""]
        cut = f"{first[:_SHOWN]}…" if more or len(first) > _SHOWN else first
        _note(f"Taken back: {cut}")
        return True

    def _set_system(self, argument: str) -> bool:
        if not argument:
            _note("There are no instructions." if self._system is None else f"Instructions: {self._system}")
            return True
        _, said = _apart(self._session.messages)
        self._begin_with(argument, said, "/system")
        _note("The instructions hold from the next answer on.")
        return True

    def _save(self, argument: str) -> bool:
        from edgephi.runtime.conversation import write_conversation

        path = _path(argument) if argument else self._file
        if path is None:
            return _refused("Name a file: /save FILE.")
        # a file that this chat wrote or began with is its own to replace
        write_conversation(path, self._session.messages, replace=path == self._file)
        self._file = path
        _note(f"Saved {len(self._session.messages)} messages in {path}; --resume and /load go on with them.")
        return True

    def _load(self, argument: str) -> bool:
        from edgephi.runtime.conversation import read_conversation

        if not argument:
            return _refused("Name a file: /load FILE.")
        path = _path(argument)
        system, said = _apart(read_conversation(path))
        self._begin_with(system, said, "/load")
        self._file = path
        _note(f"The conversation goes on with {len(self._session.messages)} messages.")
        return True

    def _reset(self, argument: str) -> bool:
        self._session.reset()
        _note("The conversation starts anew.")
        return True

    def _begin_with(self, system: str | None, said: tuple[Message, ...], command: str) -> None:
        """Another session in the place of this one, unless the model cannot be given its messages."""
        _require_answerable(self._model, system, said, command)
        session = self._model.session(system=system, messages=said, adapter=self._adapter, **self._sampling)
        self._session.close()
        self._session, self._system = session, system


def is_exit(line: str) -> bool:
    """Whether the line ends the chat."""
    return ALIASES.get(line, line) == "/exit"


def parse_command(line: str) -> tuple[Command | None, str] | None:
    """A command and what stands behind it; None as the command: a word that is none. None: a message."""
    name, *rest = line.split(maxsplit=1)
    name = ALIASES.get(name, name)
    for command in COMMANDS:
        if command.name == name:
            return command, rest[0].strip() if rest else ""
    return (None, "") if _COMMAND.fullmatch(line) else None


def _apart(messages: tuple[Message, ...]) -> tuple[str | None, tuple[Message, ...]]:
    """The instructions, and the other messages."""
    if messages and messages[0].get("role") == "system":
        return str(messages[0].get("content", "")), messages[1:]
    return None, messages


def _require_answerable(model: Model, system: str | None, said: tuple[Message, ...], named: str) -> None:
    """Refuse once, and not with every line, what no line can be answered with.

    Raises:
        PromptError: the model has no chat template, or cannot be given these messages; `named` is where they come from.
    """
    from edgephi.runtime.sampling import Sampling

    question: Message = {"role": "user", "content": "a"}
    if model.template is None:
        model.encode_chat([question])
    if system is None and not said:
        return
    messages = [*([{"role": "system", "content": system}] if system is not None else []), *said]
    if not said or said[-1].get("role") != "user":
        messages.append(question)
    try:
        model.prepare(lambda: model.encode_chat(messages), Sampling())
    except PromptError as error:
        raise PromptError(
            f"{named} cannot be used: {error.what}", where=error.where, remedy=f"Leave {named} out. {error.remedy}"
        ) from error


def _path(argument: str) -> Path:
    """A file as it is typed: quotes around it are not part of the name, and ~ is the home folder.

    Raises:
        UsageError: it has several lines.
    """
    name = argument[1:-1] if len(argument) > 1 and argument[0] == argument[-1] in "\"'" else argument
    if len(name.splitlines()) != 1:
        raise UsageError("the name of a file is one line", where=name, remedy="Name a file")
    return Path(name).expanduser() if name.startswith("~/") else Path(name)


def _providers(answer: Answer) -> str:
    return f"{answer.prefill_provider} (prompt), {answer.provider} (tokens)"


def _note(line: str) -> None:
    from edgephi.commands.terminal.console import stderr

    stderr().print(printable_lines(line), style="dim", soft_wrap=True)


def _refused(sentence: str) -> bool:
    from edgephi.commands.terminal.console import stderr

    stderr().print(printable_lines(sentence), style="red", soft_wrap=True)
    return False
