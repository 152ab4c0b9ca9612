"""The chat template of a folder. What renders it is `edgephi/templates/chat_template.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from edgephi.errors import PromptError, TokenizerError
from edgephi.files import read_json_object, read_text, require_inside
from edgephi.templates.chat_template import SOURCE_LIMIT, ChatTemplate, Message

__all__ = ["ChatTemplate", "Message", "empty_prompt", "read_template", "special_tokens", "user_message"]

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
FILE_LIMIT = 32 * 2**20
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REMEDY = "Export the model again"


def read_template(
    folder: Path, *, now: Callable[[], datetime] = datetime.now, wait: bool = True
) -> ChatTemplate | None:
    """The chat template of a folder, or None when it has none (a base model).

    chat_template.jinja goes before `chat_template` in tokenizer_config.json; of several named templates there, the one
    called "default" is taken. The arguments are those of `ChatTemplate`.

    Raises:
        TokenizerError: a file is unreadable or a link out of the folder, none of several templates is called default,
            or the template cannot be used (see `ChatTemplate`).
        DeviceError: no child process can be started to render it (step `process`).
    """
    path, config = folder / TEMPLATE, _config(folder)
    source: object = None
    if os.path.lexists(path):
        require_inside(path, folder, TokenizerError, _REMEDY)
        source = read_text(path, limit=4 * SOURCE_LIMIT, error=TokenizerError, remedy=_REMEDY)
    if not source:
        path = folder / TOKENIZER_CONFIG
        source = config.get("chat_template")
    if isinstance(source, list):
        source = _default(source, path)
    if not source:
        return None
    if not isinstance(source, str):
        raise TokenizerError("the chat template is not a text", where=path, remedy=_REMEDY)
    return ChatTemplate(source, special_tokens(config), now=now, wait=wait)


def special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Special tokens by name from tokenizer_config.json, where each is a text or an object with `content`."""
    found: dict[str, str] = {}
    for name in SPECIAL:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def user_message(text: str) -> Message:
    """A question as a message.

    Raises:
        PromptError: the text is blank; the template would make a prompt of it all the same.
    """
    if not text.strip():
        raise empty_prompt()
    return {"role": "user", "content": text}


def empty_prompt() -> PromptError:
    """What a prompt without content is refused with."""
    return PromptError("the prompt is empty", remedy="Give at least one word")


def _config(folder: Path) -> dict[str, object]:
    path = folder / TOKENIZER_CONFIG
    if not os.path.lexists(path):
        return {}
    require_inside(path, folder, TokenizerError, _REMEDY)
    return read_json_object(path, error=TokenizerError, remedy=_REMEDY, limit=FILE_LIMIT)


def _default(entries: list[object], where: Path) -> object:
    """The template called default among `{"name", "template"}` objects."""
    named = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    found = [template for name, template in named if name == "default"]
    if len(found) != 1:
        names = ", ".join(str(name)[:60] for name, _ in named[:8]) or "none"
        raise TokenizerError(
            f"{'several' if found else 'none'} of the chat templates are called default (there are: {names})",
            where=where,
            remedy=f"Put the template to use into {TEMPLATE}",
        )
    return found[0]
