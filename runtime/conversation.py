"""A conversation as a file: a JSON list of messages, as `Session.messages` has them and OpenAI's interface takes."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from edgephi.errors import OutputError, UsageError
from edgephi.files import parse_json, read_file, refuse_path, unwritable
from edgephi.runtime.text.templates import Message

LIMIT = 64 * 2**20
"""Bytes of a file that is read."""
ROLES = ("system", "user", "assistant", "tool")
_REMEDY = "Give a JSON list of messages with role and content, as /save writes it"


def read_conversation(path: Path) -> tuple[Message, ...]:
    """The messages of a file, or of its key "messages" where it holds an object.

    Raises:
        UsageError: it is missing, no JSON, or holds something else; the message is named.
    """
    data = read_file(path, limit=LIMIT, error=UsageError, remedy=_REMEDY)
    found = parse_json(data, where=path, error=UsageError, remedy=_REMEDY)
    if isinstance(found, dict):
        found = found.get("messages")
    if not isinstance(found, list):
        raise UsageError("the file holds no list of messages", where=path, remedy=_REMEDY)
    for number, message in enumerate(found, 1):
        if problem := _problem(message, first=number == 1):
            raise UsageError(f"message {number} {problem}", where=path, remedy=_REMEDY)
    return tuple(found)


def _problem(message: object, *, first: bool) -> str | None:
    if not isinstance(message, dict):
        return "is no object"
    role = message.get("role")
    if role not in ROLES:
        return f"has the role {str(role)[:40]!r}, which is none of {', '.join(ROLES)}"
    if role == "system" and not first:
        return "has the role 'system', which only the first may have"
    return None if isinstance(message.get("content"), str) else "has no text as its content"


def write_conversation(path: Path, messages: Sequence[Message], *, replace: bool = False) -> None:
    """Write messages to a file that only this user may read; it is there whole or not at all.

    Args:
        replace: a file that is there. Otherwise it stays, and that is an error.

    Raises:
        OutputError: there is such a file, or it cannot be written.
    """
    refuse_path(OutputError, path)
    if not path.name or os.path.isdir(path):  # noqa: PTH112 - False where the system refuses to look
        raise OutputError("this is a folder", where=path, remedy="Name a file")
    if not replace and os.path.lexists(path):
        raise OutputError("there is such a file already", where=path, remedy="Choose another name")
    text = json.dumps(list(messages), indent=2, ensure_ascii=False) + "\n"
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(text.encode("utf-8", errors="surrogatepass"))
        beside.replace(path)
    except OSError as problem:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise unwritable(problem, path, "Choose another name") from problem
