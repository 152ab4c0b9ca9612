"""How models write calls of tools: what a template tells about it, grammars that hold a model to it, and reading it.

Phi-4-mini: `<|tool_call|>[{"name", "arguments"}, …]<|/tool_call|>`, or `functools[…]`. Hermes and Qwen: one
`<tool_call>{"name", "arguments"}</tool_call>` for each call. Llama 3: `{"name", "parameters"}` alone. Models leave
closers and brackets out, and take `parameters` for `arguments`.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from edgephi.arguments import wrong
from edgephi.errors import PromptError
from edgephi.runtime.grammar import JSON_OPTIONS, require_few_remainders
from edgephi.runtime.tools.functions import Tool, ToolCall, as_json, call_messages, with_read_arguments
from edgephi.templates.chat_template import Message

Reader = Callable[[str], tuple[ToolCall, ...]]


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls, and where its template takes tools and results.

    Args:
        openers: what calls begin with; bare JSON at the beginning of an answer is one too.
        closers: what they end with, if the model thinks of it.
        arguments: the key they stand under.
        listed: calls are a list in brackets.
        in_message: tools are a JSON text in the system message, not the template's argument; results are turns of
            the role `tool_response`, and calls a text of the assistant's.
    """

    openers: tuple[str, ...]
    closers: tuple[str, ...] = ()
    arguments: Literal["arguments", "parameters"] = "arguments"
    listed: bool = False
    in_message: bool = False


PHI_4_MINI = ToolFormat(("<|tool_call|>", "functools"), ("<|/tool_call|>",), listed=True, in_message=True)
HERMES = ToolFormat(("<tool_call>",), ("</tool_call>",))
LLAMA_3 = ToolFormat((), arguments="parameters")
_ANY = ToolFormat((*PHI_4_MINI.openers, *HERMES.openers), (*PHI_4_MINI.closers, *HERMES.closers))
"""For a template that shows none of them: what is read out of answers."""


def tool_format(template: str) -> ToolFormat | None:
    """Which one a chat template (its source) is written for; None: another."""
    if "<|tool|>" in template and "<|/tool|>" in template:
        return PHI_4_MINI
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or ('"parameters"' in template and "ipython" in template):
        return LLAMA_3
    return None


def with_tools(
    form: ToolFormat | None, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[Sequence[Message], list[Mapping[str, object]] | None]:
    """Messages and the argument `tools` for a template. Messages have calls and results as OpenAI has them.

    Raises:
        PromptError: the arguments of a call in a message are no JSON object.
    """
    if isinstance(messages, list | tuple):  # what else may have been given, the template refuses
        messages = [_turn(form, message) if isinstance(message, Mapping) else message for message in messages]
    if not tools:
        return messages, None
    if form is None or not form.in_message:
        return messages, [tool.described for tool in tools]
    text = as_json([tool.flat for tool in tools])
    if messages and messages[0].get("role") == "system":
        return [{**messages[0], "tools": text}, *messages[1:]], None
    return [{"role": "system", "content": "", "tools": text}, *messages], None


def _turn(form: ToolFormat | None, message: Message) -> Message:
    """A message as the template takes it. Calls and results are turns of their own, which are closed: the one that
    Phi-4-mini's template has for the role `tool` is not."""
    calls = message.get("tool_calls")
    if isinstance(calls, Sequence) and calls:
        calls = [with_read_arguments(call) for call in calls]
        if form is None or not form.in_message:
            return {**message, "tool_calls": calls}
        functions = [call["function"] for call in calls]
        written = as_json([{"name": one.get("name"), form.arguments: one.get("arguments")} for one in functions])
        content = f"{message.get('content') or ''}{form.openers[0]}{written}{form.closers[0]}"
        return {"role": "assistant", "content": content}
    if form is not None and form.in_message and message.get("role") == "tool":
        return {"role": "tool_response", "content": message.get("content")}
    return message


def assistant_message(form: ToolFormat | None, text: str, calls: Sequence[ToolCall]) -> Message:
    """What an answer is in a conversation: its text, or its calls and what was said before them."""
    if not calls:
        return {"role": "assistant", "content": text}
    openers = (form or _ANY).openers
    places = [place for opener in openers if (place := text.find(opener)) >= 0]
    return {
        "role": "assistant",
        "content": text[: min(places, default=0)].strip(),
        "tool_calls": call_messages(calls),
    }


def calls_grammar(form: ToolFormat | None, tools: Sequence[Tool], choice: str, *, parallel: bool = True) -> str | None:
    """A Lark grammar that holds calls to the tools' schemas; None: nothing is held.

    Args:
        choice: `auto` (text, or calls, or both), `required`, or the name of a tool.
        parallel: whether there may be several calls. If not, nothing follows the one.

    Raises:
        UsageError: there is no such tool.
        PromptError: calls are required of a model whose form of them is not known, or a schema is no JSON.
        GrammarError: a schema takes too much time to enforce.
    """
    names = [tool.name for tool in tools]
    if choice not in ("auto", *(("required",) if tools else ()), *names):
        raise wrong(
            "tool_choice", choice, f"'auto', 'required' or a tool's name ({', '.join(names) or 'there is none'})"
        )
    if form is None:
        if choice == "auto":
            return None
        raise PromptError(
            "how this model writes calls is not known from its chat template",
            where="tool_choice",
            remedy="Use a model whose template takes tools, or ask for the arguments with response_format",
        )
    chosen = [tool for tool in tools if choice in ("auto", "required", tool.name)]
    schemas = [tool.parameters for tool in chosen]
    as_json(schemas)
    require_few_remainders(schemas)
    call = "\n".join(
        [
            "call: " + " | ".join(f"call_{place}" for place in range(len(chosen))),
            *(f"call_{place}: {_call(form, tool)}" for place, tool in enumerate(chosen)),
        ]
    )
    return "\n".join([*_around(form, forced=choice != "auto", parallel=parallel), call, ""])


def _around(form: ToolFormat, *, forced: bool, parallel: bool) -> list[str]:
    """Where calls may stand: the rules from `start` down to `call`. `head` ends with the first opener in a text."""
    text = r"TEXT: /(.|\n)*/"
    if form is LLAMA_3:
        return ["start: call"] if forced else ["start: call | TEXT", r"TEXT: /([^{\s](.|\n)*)?/"]
    opener, closer = _quoted(form.openers[0]), _quoted(form.closers[0])
    head = rf"head[lazy]: /(.|\n)*/ {opener}"
    if not form.listed:
        if forced:
            return ['start: one ("\\n" one)*' if parallel else "start: one", rf'one: {opener} "\n" call "\n" {closer}']
        start = "start: one* TEXT" if parallel else "start: one | TEXT"
        return [start, rf'one: head "\n" call "\n" {closer}', head, text]
    more = 'call (", " call)* "]"' if parallel else 'call "]"'
    if forced:
        return [f'start: {opener} "[" {more} {closer}']
    other = rf"other[lazy]: /(.|\n)*/ {_quoted(form.openers[1] + '[')}"
    return [
        "start: marked* (named | TEXT)" if parallel else "start: marked | named | TEXT",
        f'marked: head "[" {more} {closer}',
        f"named: other {more}",
        head,
        other,
        text,
    ]


def _call(form: ToolFormat, tool: Tool) -> str:
    """One call of a tool. Its schema is a document of its own, because references in it begin at its root."""
    schema = as_json({**tool.parameters, "x-guidance": dict(JSON_OPTIONS)})
    begin = f'{{"name": {json.dumps(tool.name)}, "{form.arguments}": '
    return f"{_quoted(begin)} %json {schema} {_quoted('}')}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def reader(form: ToolFormat | None, tools: Sequence[Tool]) -> Reader:
    """What reads the calls out of an answer."""
    known = frozenset(tool.name for tool in tools)
    return lambda text: read_calls(form or _ANY, text, known)


def read_calls(form: ToolFormat, text: str, names: frozenset[str]) -> tuple[ToolCall, ...]:
    """The calls of known tools in an answer, in order; none where it is a text."""
    found: list[ToolCall] = []
    whole = text[: _closed_end(text)]
    place = _begin(form, text, 0)
    while place is not None:
        place = _skip(form, text, place)
        value, end = _value(text, place, whole)
        call = _made(value, names)
        if call is not None:
            found.append(call)
        place = _next(form, text, end) if value is not None else _begin(form, text, place + 1, bare=False)
    return tuple(found)


def _begin(form: ToolFormat, text: str, start: int, *, bare: bool = True) -> int | None:
    """Where calls begin: behind an opener (`functools` wants its bracket), or at JSON that an answer begins with."""
    openers = [re.escape(opener) + (r"(?=\s*\[)" if opener.isalpha() else "") for opener in form.openers]
    if openers and (match := re.compile("|".join(openers)).search(text, start)):
        return match.end()
    stripped = text.lstrip()
    return len(text) - len(stripped) if bare and stripped[:1] in ("{", "[") else None


def _skip(form: ToolFormat, text: str, place: int) -> int:
    """Behind what stands between calls."""
    between = "|".join([r"[\s,;\[\]]", *map(re.escape, (*form.openers, *form.closers))])
    match = re.compile(f"(?:{between})*").match(text, place)
    return place if match is None else match.end()


def _next(form: ToolFormat, text: str, place: int) -> int | None:
    """Where a further call begins: right here, or behind a further opener."""
    here = _skip(form, text, place)
    return here if text[here : here + 1] == "{" else _begin(form, text, place, bare=False)


def _closed_end(text: str) -> int:
    """Where a text ends, less closers of any name, brackets and spaces."""
    end = len(text)
    while end:
        closer = _CLOSER.search(text[max(0, end - LONGEST_CLOSER) : end])
        if closer is None:
            break
        end -= len(closer[0])
    return end


def _value(text: str, place: int, whole: str) -> tuple[object, int]:
    """The JSON object there; braces that miss at the end of a text are thought there. None: there is none.

    Args:
        whole: the text as far as calls can go.
    """
    if text[place : place + 1] != "{":
        return None, place
    try:
        return _JSON.raw_decode(text, place)
    except json.JSONDecodeError as problem:
        if problem.pos < len(whole):
            return None, place
    except (ValueError, RecursionError):
        return None, place
    for braces in ("}", "}}"):
        with suppress(ValueError, RecursionError):
            return _JSON.raw_decode(whole[place:] + braces)[0], len(text)
    return None, place


def _finite(written: str) -> float:
    """Raises ValueError for a number that no JSON can hold, which no template and no function could be given."""
    value = float(written)
    if not math.isfinite(value):
        raise ValueError(f"{written} is no number of JSON's")
    return value


LONGEST_CLOSER = 64
"""Characters."""
_CLOSER = re.compile(r"(<\|?/\w+\|?>|[\]\s])\Z")
_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _made(value: object, names: frozenset[str]) -> ToolCall | None:
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict):
        inner = value if isinstance(value, dict) else {}
    name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):  # JSON within JSON, as OpenAI's interface has it
        try:
            arguments = _JSON.decode(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments, f"call_{uuid.uuid4().hex[:9]}")
