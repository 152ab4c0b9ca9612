"""Tools: functions that a model may ask to have called, and the calls it asks for."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError, create_model
from pydantic_core import PydanticSerializationError

from edgephi.arguments import wrong
from edgephi.errors import PromptError, UsageError, one_line

Function: TypeAlias = Callable[..., object]
ToolLike: TypeAlias = Function | Mapping[str, object]
"""A Python function, or a description as OpenAI has it: `{"type": "function", "function": {"name", "description",
"parameters"}}`, or only the inner part of it."""

CHOICES = ("auto", "required")
"""What `tool_choice` may be beside a tool's name."""
_ARGUMENT = re.compile(r"^\s+(\*{0,2}\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$")
_WANTED = "a list of functions, or of descriptions like {'name': 'clock', 'description': …, 'parameters': {…}}"


@dataclass(frozen=True)
class ToolCall:
    """What a model wants to have called."""

    name: str
    arguments: Mapping[str, object]
    id: str
    """Tells calls of one answer apart."""


@dataclass(frozen=True)
class Tool:
    """A tool as templates and grammars need it."""

    name: str
    description: str
    parameters: Mapping[str, object]
    """JSON Schema of an object."""
    given: Mapping[str, object] | None = None
    """The description as the caller wrote it, if it is no function."""
    function: Function | None = None
    arguments: type[BaseModel] | None = None

    @property
    def described(self) -> Mapping[str, object]:
        """As a template is given it."""
        return {"type": "function", "function": self.flat} if self.given is None else self.given

    @property
    def flat(self) -> Mapping[str, object]:
        return {"name": self.name, "description": self.description, "parameters": self.parameters}

    def call(self, arguments: Mapping[str, object]) -> str:
        """Call the function; its result as a text, JSON where it is none. Arguments it does not take are an answer to
        the model, which may try again; what the function itself raises passes."""
        if self.function is None or self.arguments is None:
            raise UsageError(
                f"the tool {self.name!r} is a description and no function",
                remedy="Give functions, or call `chat` and answer its tool_calls yourself",
            )
        try:
            values = self.arguments.model_validate(dict(arguments))
        except ValidationError as problem:
            said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problem.errors()[:5])
            return f"Error: {said}"
        named = {field: getattr(values, field) for field in self.arguments.model_fields}
        result = self.function(**named)
        if isinstance(result, str):
            return result
        try:
            return TypeAdapter(Any).dump_json(result).decode()
        except (PydanticSerializationError, RecursionError) as problem:
            if inspect.iscoroutine(result):
                result.close()  # else Python warns that nobody awaited it
            raise UsageError(
                f"the tool {self.name!r} returned a value of the type {type(result).__name__}, which is no text and "
                f"cannot be written as JSON: {one_line(problem)}",
                remedy="Let the function return a text, or values that JSON has",
            ) from problem


def make_tools(tools: Sequence[ToolLike] | None) -> tuple[Tool, ...]:
    """Tools of functions and descriptions.

    Raises:
        PromptError: no list, an entry is neither, or a description has no name.
        UsageError: a function's signature cannot be told to a model, or two tools have one name, or one of `CHOICES`.
    """
    if tools is None:
        return ()
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise wrong("tools", tools, _WANTED, PromptError)
    made = tuple(_described(tool) if isinstance(tool, Mapping) else _function(tool) for tool in tools)
    names = Counter(tool.name for tool in made)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UsageError(f"two tools are called {min(twice)!r}", remedy="Give each a name of its own")
    if taken := [name for name in CHOICES if name in names]:
        raise UsageError(
            f"a tool is called {taken[0]!r}, which means something else as tool_choice", remedy="Give it another name"
        )
    return made


def _described(tool: Mapping[str, object]) -> Tool:
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    parameters = inner.get("parameters") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(name, str) or not name:
        raise wrong("a tool", tool, _WANTED, PromptError)
    if not isinstance(parameters, Mapping):
        parameters = {"type": "object", "properties": {}}
    return Tool(name, str(inner.get("description", "")), parameters, given=tool)


def _function(function: object) -> Tool:
    if not callable(function):
        raise wrong("a tool", function, _WANTED, PromptError)
    name = getattr(function, "__name__", type(function).__name__)
    text, explained = _docstring(inspect.getdoc(function) or "")
    try:
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise UsageError(
                    f"the tool {name!r} takes {parameter}, which has no name to give it by",
                    remedy="Give its parameters names, without * and /",
                )
            if parameter.name not in hints:
                raise UsageError(
                    f"the parameter {parameter.name!r} of the tool {name!r} has no type", remedy="Annotate it"
                )
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (hints[parameter.name], Field(default, description=explained.get(parameter.name)))
        arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        schema = _without_titles(arguments.model_json_schema())
    except UsageError:
        raise
    except (PydanticUserError, NameError, TypeError, ValueError) as problem:
        raise UsageError(
            f"the signature of the tool {name!r} has no JSON Schema: {one_line(problem)}",
            remedy="Annotate it with types that JSON has",
        ) from problem
    assert isinstance(schema, dict)
    return Tool(name, text, schema, function=function, arguments=arguments)


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the sections of a docstring, and the lines of its parameters (Google's style)."""
    head: list[str] = []
    explained: dict[str, str] = {}
    section, last = "", ""
    for line in text.splitlines():
        if started := _SECTION.match(line):
            section, last = started[1], ""
        elif not section:
            head.append(line)
        elif section in ("Args", "Arguments", "Parameters"):
            if named := _ARGUMENT.match(line):
                last = named[1].lstrip("*")
                explained[last] = named[2].strip()
            elif last and line.strip():
                explained[last] = f"{explained[last]} {line.strip()}"
    return " ".join(" ".join(head).split()), explained


def _without_titles(schema: object, *, names: bool = False) -> object:
    """pydantic writes a title beside every name; a small model reads them all. Keys of `properties` are no keywords."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value, names=not names and key in ("properties", "$defs"))
            for key, value in schema.items()
            if names or key != "title"
        }
    return [_without_titles(one) for one in schema] if isinstance(schema, list) else schema


def call_messages(calls: Sequence[ToolCall]) -> list[dict[str, object]]:
    """Calls as the messages of a conversation have them."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
        for call in calls
    ]


def result_messages(calls: Sequence[Mapping[str, object]], results: Sequence[str]) -> list[dict[str, object]]:
    """Results of calls (as messages have them), in their order, as messages."""
    return [
        {"role": "tool", "name": _function_of(call).get("name"), "tool_call_id": call.get("id"), "content": result}
        for call, result in zip(calls, results, strict=True)
    ]


def with_read_arguments(call: object) -> dict[str, Any]:
    """A call of a message with its arguments as an object: OpenAI's interface has them as a JSON text, templates write
    JSON themselves.

    Raises:
        PromptError: they are no JSON object, or there is no function.
    """
    function = _function_of(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(call, Mapping) or not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
        wanted = "calls like {'function': {'name': 'clock', 'arguments': '{}'}}"
        raise wrong("a call in tool_calls", call, wanted, PromptError)
    return {**call, "function": {**function, "arguments": arguments}}


def _function_of(call: object) -> Mapping[str, object]:
    function = call.get("function") if isinstance(call, Mapping) else None
    return function if isinstance(function, Mapping) else {}


def as_json(value: object) -> str:
    """For a template or a grammar."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as problem:
        raise PromptError(
            f"a tool's description is no JSON: {one_line(problem)}", where="tools", remedy=f"Give {_WANTED}"
        ) from problem
