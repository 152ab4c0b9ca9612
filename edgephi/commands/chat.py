"""edgephi chat: a conversation in the terminal."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.options import (
    ADAPTER,
    AdapterFile,
    Bundle,
    Device,
    Engine,
    Fallback,
    MaxNewTokens,
    Seed,
    Speculation,
    Temperature,
    TopP,
)

if TYPE_CHECKING:
    from edgephi.runtime.model import Model
    from edgephi.runtime.session import Session

# "/usr/bin is what?" is a message; one word alone is a command that was mistyped
_COMMAND = re.compile(r"/[A-Za-z]\w*")
HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


def chat(
    folder: Bundle,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instructions the conversation starts with.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    adapter: AdapterFile = None,
    device: Device = "auto",
    fallback: Fallback = False,
    engine: Engine = None,
    speculation: Speculation = None,
) -> None:
    """Talk with a model; one line is one message.

    /reset forgets the conversation, /help explains, /exit or Ctrl-D ends. Ctrl-C stops an answer, which stays in the
    conversation as far as it went; at the prompt it ends the chat. Messages may also be piped in, one a line; the exit
    status is then 1 if one was refused, and the others are answered.
    """
    from edgephi.commands.console import stderr
    from edgephi.runtime.model import load

    note = stderr()
    all_taken = True
    adapters = None if adapter is None else {ADAPTER: adapter}
    with load(folder, device, fallback=fallback, engine=engine, speculation=speculation, adapters=adapters) as model:
        _require_answerable(model, system)
        session = model.session(
            system=system,
            adapter=None if adapter is None else ADAPTER,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        if sys.stdin.isatty():
            note.print(HELP, style="dim")
        while (line := _read_line()) is not None and line != "/exit":
            if line == "/reset":
                session.reset()
                note.print("The conversation starts anew.", style="dim")
            elif line == "/help":
                note.print(HELP, style="dim")
            elif _COMMAND.fullmatch(line):
                note.print(f"There is no command {line}. {HELP}", style="red")
                all_taken = False
            elif line:
                all_taken = _answer(session, line) and all_taken
    if not all_taken and not sys.stdin.isatty():
        raise typer.Exit(1)


def _require_answerable(model: Model, system: str | None) -> None:
    """Refuse once, and not with every line, what no line can be answered with.

    Raises:
        PromptError: the model has no chat template, or cannot be given this system message.
    """
    from edgephi.errors import PromptError
    from edgephi.runtime.sampling import Sampling

    question = {"role": "user", "content": "a"}
    if model.template is None:
        model.encode_chat([question])
    if system is None:
        return
    messages = [{"role": "system", "content": system}, question]
    try:
        model.prepare(lambda: model.encode_chat(messages), Sampling())
    except PromptError as error:
        raise PromptError(
            f"--system cannot be used: {error.what}", where=error.where, remedy=f"Leave --system out. {error.remedy}"
        ) from error


def _answer(session: Session, line: str) -> bool:
    """Print an answer; False: the message was refused, and the conversation goes on without it."""
    from edgephi.commands.console import print_statistics, print_stream, stderr
    from edgephi.errors import PromptError

    try:
        print_statistics(print_stream(session.say(line)))
    except PromptError as error:
        stderr().print(str(error), style="red", soft_wrap=True)
        return False
    return True


def _read_line() -> str | None:
    """The next message, stripped; None at the end of the input or on Ctrl-C."""
    try:
        if sys.stdin.isatty():
            return input("> ").strip()
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        return None
    return line.strip() if line else None
