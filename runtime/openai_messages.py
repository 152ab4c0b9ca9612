"""Messages and tools of a request to OpenAI's chat completions, as `Model.chat` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgephi.arguments import wrong
from edgephi.errors import PromptError, UsageError
from edgephi.runtime.tools.functions import make_tools, with_read_arguments

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Of OpenAI's, by what chat templates call them."""
_READ = {
    # `parsed` is what a client's own parser made of the text; the text counts
    "assistant": {"role", "content", "tool_calls", "parsed"},
    "tool": {"role", "content", "tool_call_id"},
}
_OF_A_CALL = {"id", "type", "function", "index"}
_OF_CALLED = {"name", "arguments", "parsed_arguments"}
"""The last is what a client's own parser made of the arguments; the text counts."""
_OF_A_FUNCTION = {"name", "description", "parameters", "strict"}

Tools = list[dict[str, Any]]


def read_messages(value: object) -> list[dict[str, Any]]:
    """Messages with each content as one text, arguments of calls as objects, and results in the order of their calls.

    Raises:
        UsageError: a message, or a part of one, that is not read here; `where` says which, like `messages[2].name`.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _wrong("messages", "messages is no list with a message", "Give a list of messages")
    read: list[dict[str, Any]] = []
    asked: dict[str, str] = {}
    """Names of the last message's calls by their ids, in order."""
    results: dict[str, dict[str, Any]] = {}
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        made = _message(message, where)
        if made["role"] == "tool":
            name = made["tool_call_id"]
            if name not in asked or name in results:
                raise _wrong(
                    f"{where}.tool_call_id",
                    f"no call with the id {name!r} waits for a result",
                    "Put results behind the assistant's message that has the calls in tool_calls",
                )
            results[name] = {**made, "name": asked[name]}
            if len(results) == len(asked):
                read += [results[each] for each in asked]
                asked, results = {}, {}
            continue
        _require_answered(asked, where)
        calls = made.get("tool_calls", ())
        asked = {str(call.get("id")): str(call["function"]["name"]) for call in calls}
        if len(asked) != len(calls):
            raise _wrong(f"{where}.tool_calls", "two calls have the same id", "Give each an id of its own")
        read.append(made)
    _require_answered(asked, "messages")
    return read


def _require_answered(asked: Mapping[str, str], where: str) -> None:
    if asked:
        raise _wrong(
            where,
            f"calls have no results: {', '.join(sorted(asked))}",
            "Put a message of the role tool for each behind the message with the calls",
        )


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(where, "a message is no dictionary", "Give messages like {'role': 'user', 'content': 'Hello'}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}.role", f"a message has the role {role!r}", f"Choose from {', '.join(ROLES)}")
    known = _READ.get(role, {"role", "content"})
    for key, value in message.items():
        if key not in known and value not in (None, [], ""):
            raise _wrong(f"{where}.{key}", f"{key} of a message of the role {role} is not supported", "Leave it out")
    made: dict[str, Any] = {"role": ROLES[role]}
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls:
        made["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    made["content"] = "" if content is None and calls else _text(content, f"{where}.content")
    if role == "tool":
        made["tool_call_id"] = message.get("tool_call_id")
        if not isinstance(made["tool_call_id"], str):
            raise _wrong(f"{where}.tool_call_id", "a result does not say of which call", "Give the call's id")
    return made


def _require_known(given: Mapping[str, object], known: set[str], where: str) -> None:
    for key, value in given.items():
        if key not in known and value is not None:
            raise _wrong(f"{where}.{key}", f"the field {key} is not supported", "Leave it out")


def _text(content: object, where: str) -> str:
    """The content as one text; parts stand on lines of their own."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise _wrong(where, "the content of a message is no text", "Give a text, or a list of parts with texts")
    texts: list[str] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise _wrong(
                f"{where}[{number}]", f"a part of the type {kind!r} is not supported: only text is read", "Leave it out"
            )
        texts.append(text)
    return "\n".join(texts)


def _calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise _wrong(where, "tool_calls is no list", "Give the calls as the answer had them")
    made = []
    for number, call in enumerate(calls):
        try:
            read = with_read_arguments(call)
        except PromptError as problem:
            raise _wrong(f"{where}[{number}]", problem.what, problem.remedy) from None
        _require_known(read, _OF_A_CALL, f"{where}[{number}]")
        function = read["function"]
        _require_known(function, _OF_CALLED, f"{where}[{number}].function")
        called = {"name": function["name"], "arguments": function["arguments"]}
        made.append({"id": read.get("id"), "type": "function", "function": called})
    return made


def read_tools(value: object) -> Tools:
    """Descriptions of functions, without what needs no telling (`strict`: arguments always follow their schema).

    Raises:
        UsageError: no list, a custom tool, a function without a name, or two of one name.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _wrong("tools", "tools is no list", "Give a list of functions")
    made: Tools = []
    for number, tool in enumerate(value):
        where = f"tools[{number}]"
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or kind != "function":
            raise _wrong(where, f"a tool of the type {kind!r} is not supported", "Give functions")
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise _wrong(where, "a function has no name", "Give it a name")
        _require_known(tool, {"type", "function"}, where)
        _require_known(function, _OF_A_FUNCTION, f"{where}.function")
        described = {key: function[key] for key in ("description", "parameters") if function.get(key) is not None}
        if not isinstance(described.get("description", ""), str):
            raise _wrong(where, f"the description of {name} is no text", "Give a text")
        if not isinstance(described.get("parameters", {}), Mapping):
            raise _wrong(where, f"the parameters of {name} are no JSON Schema", "Give a JSON Schema of an object")
        made.append({"type": "function", "function": {"name": name, **described}})
    try:
        make_tools(made)
    except UsageError as problem:
        raise _wrong("tools", problem.what, problem.remedy) from None
    return made


def read_tool_choice(value: object, tools: Tools) -> tuple[str, Tools]:
    """`Model.chat`'s `tool_choice`, and the tools that are left: all, the allowed ones, or none.

    Raises:
        UsageError: no choice there is, or one of a tool there is not.
    """
    names = [tool["function"]["name"] for tool in tools]
    wanted = "Give 'none', 'auto', 'required', or {'type': 'function', 'function': {'name': …}}"
    if isinstance(value, str) and value in ("none", "auto"):
        return "auto", [] if value == "none" else tools
    if isinstance(value, str) and value == "required":
        if not tools:
            raise _wrong("tool_choice", "a call is required, and there are no tools", "Give tools")
        return "required", tools
    if not isinstance(value, Mapping):
        raise _wrong("tool_choice", wrong("tool_choice", value, wanted).what, wanted)
    if value.get("type") == "function":
        return _chosen(value, names, wanted), tools
    allowed = value.get("allowed_tools")
    if value.get("type") != "allowed_tools" or not isinstance(allowed, Mapping):
        raise _wrong("tool_choice", f"tool_choice has the type {str(value.get('type'))[:60]!r}", wanted)
    mode, listed = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required") or not isinstance(listed, Sequence) or not listed:
        raise _wrong("tool_choice", "allowed_tools has no mode, or no list of tools", "Give both")
    chosen = {_chosen(tool, names, "Give functions that are in tools") for tool in listed}
    return str(mode), [tool for tool in tools if tool["function"]["name"] in chosen]


def _chosen(value: object, names: Sequence[str], wanted: str) -> str:
    function = value.get("function") if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        raise _wrong("tool_choice", f"no function of tools is called {str(name)[:60]!r}", wanted)
    return str(name)


def _wrong(where: str, what: str, remedy: str) -> UsageError:
    return UsageError(what, where=where, remedy=remedy)
