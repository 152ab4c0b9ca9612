"""edgephi chat: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.options import Bundle, Device, Fallback, MaxNewTokens, Seed, Temperature, TopP

if TYPE_CHECKING:
    from edgephi.runtime.session import Session

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
    device: Device = "auto",
    fallback: Fallback = False,
) -> None:
    """Talk with a model; one line is one message.

    /reset forgets the conversation, /help explains, /exit or Ctrl-D ends. Ctrl-C stops an answer, which stays in the
    conversation as far as it went; at the prompt it ends the chat. Messages may also be piped in, one a line.
    """
    from edgephi.commands.console import stderr
    from edgephi.runtime.model import load

    note = stderr()
    with load(folder, device, fallback=fallback) as model:
        session = model.session(
            system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        if sys.stdin.isatty():
            note.print(HELP, style="dim")
        while (line := _read_line()) is not None and line != "/exit":
            if line == "/reset":
                session.reset()
                note.print("The conversation starts anew.", style="dim")
            elif line == "/help":
                note.print(HELP, style="dim")
            elif line:
                _answer(session, line)


def _answer(session: Session, line: str) -> None:
    from edgephi.commands.console import print_statistics, print_stream, stderr
    from edgephi.errors import PromptError

    try:
        print_statistics(print_stream(session.say(line)))
    except PromptError as error:  # the conversation goes on without this message
        stderr().print(str(error), style="red", soft_wrap=True)


def _read_line() -> str | None:
    """The next message, stripped; None at the end of the input or on Ctrl-C."""
    try:
        if sys.stdin.isatty():
            return input("> ").strip()
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        return None
    return line.strip() if line else None
