"""edgephi chat: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgephi.commands.chat.answering import checked_sampling, load_model
from edgephi.commands.terminal.options import (
    AdapterFile,
    Bundle,
    Device,
    Engine,
    Fallback,
    MaxNewTokens,
    Prefill,
    Seed,
    Speculation,
    Temperature,
    TopP,
)

if TYPE_CHECKING:
    from edgephi.commands.chat.slash_commands import Conversation


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
    prefill: Prefill = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Go on with a conversation that /save wrote.", show_default=False),
    ] = None,
    keep_history: Annotated[
        bool,
        typer.Option("--history/--no-history", help="Remember typed messages in a file that only you may read."),
    ] = True,
) -> None:
    """Talk with a model.

    On a terminal, Enter sends a message; Alt-Enter, or a backslash and Enter, begin a new line. Arrow keys edit, and
    bring back earlier messages. /help lists the commands. Ctrl-C stops an answer, which stays in the conversation as
    far as it went; at the prompt it forgets the line, and a second one ends the chat, as Ctrl-D does.

    Messages may also be piped in, one a line; then /reset, /help and /exit are the only commands, and the exit status
    is 1 if a message was refused, while the others are answered.
    """
    from edgephi.commands.chat.slash_commands import Conversation
    from edgephi.runtime.conversation import read_conversation

    sampling = checked_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    resumed = None if resume is None else (read_conversation(resume), resume)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    model, adapter_name = load_model(
        folder,
        device,
        fallback=fallback,
        engine=engine,
        speculation=speculation,
        adapter=adapter,
        prefill=prefill,
    )
    with model:
        conversation = Conversation(model, sampling, system, terminal=terminal, resumed=resumed, adapter=adapter_name)
        if terminal:
            _talk(conversation, keep_history)
        elif not _read_all(conversation) and not sys.stdin.isatty():
            raise typer.Exit(1)


def _talk(conversation: Conversation, keep_history: bool) -> None:
    """Until the person who types has enough."""
    from edgephi.commands.chat.editor import Editor
    from edgephi.commands.chat.history import history_file, prepare_history
    from edgephi.commands.chat.slash_commands import is_exit
    from edgephi.commands.terminal.console import stderr
    from edgephi.errors import OutputError

    history = None
    try:
        history = prepare_history(history_file()) if keep_history else None
    except OutputError as error:
        stderr().print(str(error), style="yellow", soft_wrap=True)
    editor = Editor(history)
    stderr().print("/help lists the commands, Ctrl-D ends the chat.", style="dim")
    while (message := editor.read()) is not None and not is_exit(message):
        if (problem := editor.history_problem()) is not None:
            stderr().print(problem, style="yellow", soft_wrap=True)
        if message:
            conversation.take(message)


def _read_all(conversation: Conversation) -> bool:
    """Answer one line after the other; whether none was refused."""
    from edgephi.commands.chat.slash_commands import is_exit

    all_taken = True
    while (line := _read_line()) is not None and not is_exit(line):
        if line:
            all_taken = conversation.take(line) and all_taken
    return all_taken


def _read_line() -> str | None:
    """The next message, stripped; None at the end of the input or on Ctrl-C."""
    try:
        if sys.stdin.isatty():
            return input("> ").strip()
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        return None
    return line.strip() if line else None
