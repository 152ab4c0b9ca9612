"""What a chat template is given: messages, tools and variables as plain JSON values.

They go to another process, and a template is to see nothing but data. Whatever JSON cannot hold is named, with its
place, instead of being turned into something.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgephi.errors import PromptError
from edgephi.files import LONGEST_INTEGER

Message = Mapping[str, object]
"""`role` and `content`, and what else a template asks for (`tools`, `tool_calls` …)."""

DEPTH_LIMIT = 100
"""Lists and objects inside each other, in messages and tools."""
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


def template_values(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, object]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, object],
    *,
    keep_none: bool = False,
) -> dict[str, object]:
    """What a template is given besides the special tokens, as plain JSON values.

    Args:
        keep_none: a message keeps keys whose value is None.

    Raises:
        PromptError: no messages, malformed ones or tools, or values that JSON cannot hold.
    """
    if wrong := _RESERVED & set(variables):
        raise PromptError(f"{sorted(wrong)[0]} is no variable of its own", remedy="Give it as the argument it is")
    _check(messages)
    given: dict[str, object] = {
        # a value of None is left out, as in transformers 5: most templates would write the word
        "messages": [
            {
                key: value
                for key, value in _object(message, f"messages[{index}]", 1).items()
                if keep_none or value is not None
            }
            for index, message in enumerate(messages)
        ],
        # these two are defined even when unused: templates test them with `is none`
        "tools": None if tools is None else _plain(_tools(tools), "tools", 0),
        "documents": None,
        "add_generation_prompt": bool(add_generation_prompt),
        **_object(variables, "variables", 0),
    }
    return given


def _check(messages: Sequence[Message]) -> None:
    remedy = "Give a list of messages like {'role': 'user', 'content': 'Hello'}"
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise PromptError(f"the messages are {_named(messages)} and no list", remedy=remedy)
    if not messages:
        raise PromptError("there are no messages", remedy=remedy)
    for index, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or ("content" not in message and "tool_calls" not in message)
        ):
            raise PromptError("a message has no role or no content", where=f"message {index}", remedy=remedy)


def _tools(tools: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    for tool in tools if isinstance(tools, Sequence) else [None]:
        if not isinstance(tool, Mapping):
            raise PromptError(
                f"the tools are {_named(tools)}" if tool is None else f"a tool is {_named(tool)}",
                where="tools",
                remedy="Give a list of JSON schemas like {'name': 'clock', 'description': …, 'parameters': {…}}",
            )
    return list(tools)


def _object(value: Mapping[object, object] | Mapping[str, object], where: str, depth: int) -> dict[str, object]:
    plain: dict[str, object] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise PromptError(
                f"a key is {_named(key)}, and JSON has only texts as keys", where=where, remedy="Use a text as the key"
            )
        plain[_text(key, where)] = _plain(item, f"{where}.{key}", depth + 1)
    return plain


def _plain(value: object, where: str, depth: int) -> object:
    """A value as JSON has it: what a child process can be given, and all that a template may see.

    Raises:
        PromptError: JSON cannot hold it; the sentence names the place and the type.
    """
    if value is None or isinstance(value, bool):
        return value
    if depth > DEPTH_LIMIT:
        raise PromptError(
            f"lists or objects are more than {DEPTH_LIMIT} deep", where=where[:100], remedy="Flatten them"
        )
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int) and abs(value) < 10**LONGEST_INTEGER:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        return _object(value, where, depth)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise PromptError(
        f"{_named(value)} cannot be given to a chat template",
        where=where,
        remedy="Give texts, finite numbers, lists and dictionaries; a pydantic object has `model_dump(mode='json')`",
    )


def _text(value: str, where: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"character {error.start:,} is half of a surrogate pair, which is no text",
                where=where,
                remedy="Decode the text again, with errors='replace'",
            ) from error
    return str(value)


def _named(value: object) -> str:
    """What a value is, for a sentence."""
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, int):
        return f"an integer of more than {LONGEST_INTEGER} digits" if abs(value) >= 10**LONGEST_INTEGER else repr(value)
    return f"a value of type {type(value).__qualname__}"
