"""What a chat template can be given, found by trying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgephi.templates.chat_template import ChatTemplate, Message

TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class TemplateFacts:
    """What a template takes; what it does not take it leaves out or refuses.

    Args:
        text: a message's content as a text.
        parts: a message's content as a list of `{"type": "text", "text": …}`.
        system: a system message before the first question.
        tools: as the argument of that name, under `tools` in the system message, or not at all.
        turns: an answer and a further question.
    """

    text: bool
    parts: bool
    system: bool
    tools: Literal["argument", "system message"] | None
    turns: bool


def template_facts(template: ChatTemplate) -> TemplateFacts:
    """Facts about a template; it is rendered about ten times.

    Raises:
        TokenizerError: it cannot be compiled, or a short conversation takes more time, memory or text than it may.
        DeviceError: no child process can be started (step `process`).
    """
    text, parts = (
        template.takes([_message("user", in_parts)]) or template.takes(_system(in_parts)) for in_parts in (False, True)
    )
    form = parts and not text
    system, question = _system(form)
    alone = template.takes([question])
    opening = [question] if alone else [system, question]
    tools: Literal["argument", "system message"] | None = None
    if template.takes(opening, tools=[TOOL]):
        tools = "argument"
    elif template.takes([{**system, "tools": "[]"}, question]):
        tools = "system message"
    return TemplateFacts(
        text=text,
        parts=parts,
        system=template.takes([system, question]),
        tools=tools,
        turns=template.takes([*opening, _message("assistant", form), question]),
    )


def _message(role: str, in_parts: bool) -> Message:
    return {"role": role, "content": [{"type": "text", "text": role}] if in_parts else role}


def _system(in_parts: bool) -> list[Message]:
    return [_message("system", in_parts), _message("user", in_parts)]
