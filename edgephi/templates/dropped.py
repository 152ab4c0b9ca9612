"""Does a chat template use what it was given? A template leaves out what it has no branch for, without a word.

Phi-3-medium's has none for a system message, most have none for tools. So the conversation is rendered once more with
markers in the place of its texts, and the markers are looked for. Comparing the texts themselves would not do, because
templates strip and quote them, and cut the reasoning out of earlier answers. A marker that is not found is replaced by
another: only when that changes nothing was it left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from edgephi.errors import PromptError

Given = Mapping[str, object]
"""A template's variables, as JSON has them: `messages`, `tools` and others."""
Render = Callable[[Given], str | None]
"""A template's variables in, its text out; None when it refuses them."""
REMEMBERED = 1_000
"""Forms of conversations known to be rendered whole, before the list is begun again."""
_MEDIA = ("image", "audio", "video", "file")
_PARTS = "a list of parts like {'type': 'text', 'text': 'Hello'}"
_OWN = "Leave it out, or send a raw prompt that is written as this model expects it"


@dataclass
class _Marks:
    """Markers by what they stand for: ("content" or "tools" or "tool_calls", the number of the message or None).

    Args:
        other: of this marker another text of the same length is used.
    """

    other: str | None = None
    of: dict[tuple[str, int | None], list[str]] = field(default_factory=dict)
    count: int = 0

    def new(self, what: str, message: int | None) -> str:
        self.count += 1
        marker = f"mark{self.count:06d}end"
        self.of.setdefault((what, message), []).append(marker)
        return f"sign{self.count:06d}low" if marker == self.other else marker


def refuse_dropped(given: Given, render: Render, known: set[bytes]) -> None:
    """Raises PromptError when the template leaves out a message, the calls or tools in one, or the tools.

    What has no text to look for (white space, no content) is not missed. Neither is the content of a message whose tool
    calls are written, nor reasoning, which templates cut on purpose; nor anything where the template refuses the
    markers, which then tell nothing.

    Args:
        known: forms of conversations that were rendered whole before; this one is added.
    """
    messages = _list(given["messages"])
    marks = _Marks()
    marked = _mark(given, messages, marks)
    form = blake2b(json.dumps(marked).encode(), digest_size=16).digest()
    if form in known:
        return
    text = render(marked)
    if text is not None:
        _refuse_missing(text, marks, given, messages, render)
    if len(known) >= REMEMBERED:
        known.clear()
    known.add(form)


def refuse_form(given: Given, render: Render) -> None:
    """Raises PromptError when a template refuses contents in one form and takes them in the other.

    For a conversation that the template refused, often in Python's words: a text added to a list. Where the other form
    does not help either, something else is wrong, and nothing is raised here.
    """
    messages = _list(given["messages"])
    for index, message in enumerate(messages):
        content = _object(message).get("content")
        if content is None or isinstance(content, str):
            continue
        if is_whole({**given, "messages": [_as_text(each) for each in messages]}, render):
            held = "a list of parts" if isinstance(content, list) else f"a value of type {type(content).__name__}"
            raise PromptError(
                f"the chat template takes content as one text, and this message holds {held}",
                where=f"message {index}",
                remedy="Give its content as one text",
            )
        return
    if is_whole({**given, "messages": [_in_parts(each) for each in messages]}, render):
        raise PromptError(
            "the chat template takes content as a list of parts, and the messages hold texts",
            where="messages",
            remedy=f"Give each content as {_PARTS}",
        )


def _as_text(message: object) -> dict[str, object]:
    """The message with its content, if it is no text, as one."""
    known = _object(message)
    content = known.get("content")
    return {**known, "content": "a"} if content is not None and not isinstance(content, str) else dict(known)


def _in_parts(message: object) -> dict[str, object]:
    known = _object(message)
    content = known.get("content")
    return {**known, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(known)


def is_whole(given: Given, render: Render) -> bool:
    """Whether a template renders a conversation and leaves nothing out."""
    if render(given) is None:
        return False
    try:
        refuse_dropped(given, render, set())
    except PromptError:
        return False
    return True


def dropped_messages(given: Given, render: Render) -> tuple[int, ...] | None:
    """Numbers of the messages whose content the template leaves out, or quotes as a list; None if it refuses markers.

    What it changes on the way, such as line breaks, letters or quotation marks, is not left out.
    """
    messages = _list(given["messages"])
    marks = _Marks()
    text = render(_mark(given, messages, marks))
    if text is None:
        return None
    missing = _missing(text, marks, given, messages, render)
    return tuple(index for what, index, _ in missing if what == "content" and index is not None)


def _refuse_missing(text: str, marks: _Marks, given: Given, messages: list[object], render: Render) -> None:
    for what, index, quoted in _missing(text, marks, given, messages, render):
        if index is None:
            used = _usage(text, given, messages, render)
            raise _tools_dropped(not any(used(marker) for marker in marks.of[what, index]), given, render)
        role = f"the message of the role {str(_object(messages[index])['role'])[:60]!r}"
        if what != "content":
            told, remedy = f"leaves out the {what} of {role}", _OWN
        else:
            how = "takes content as one text, and would quote the list in" if quoted else "leaves out"
            told, remedy = f"{how} {role}", _other_form(given, messages, index, render)
        raise PromptError(f"the chat template {told}", where=f"message {index}", remedy=remedy)


def _missing(
    text: str, marks: _Marks, given: Given, messages: list[object], render: Render
) -> Iterator[tuple[str, int | None, bool]]:
    """The keys of `_Marks.of` that the text lacks, each with whether a list is quoted in it."""
    used = _usage(text, given, messages, render)
    for (what, index), markers in marks.of.items():
        if what == "content" and any(used(call) for call in marks.of.get(("tool_calls", index), [])):
            continue
        quoted = any(f"'text': '{marker}" in text or f"['{marker}" in text for marker in markers)
        if quoted or not all(used(marker) for marker in markers):
            yield what, index, quoted


def _usage(text: str, given: Given, messages: list[object], render: Render) -> Callable[[str], bool]:
    """What tells whether the text, rendered with markers, depends on one of them."""
    return lambda marker: marker in text or render(_mark(given, messages, _Marks(other=marker))) != text


def _tools_dropped(all_of_them: bool, given: Given, render: Render) -> PromptError:
    conversation = [{"role": "system", "content": "a", "tools": "[]"}, {"role": "user", "content": "b"}]
    in_message = is_whole({**given, "messages": conversation, "tools": None}, render)
    return PromptError(
        "the chat template takes no tools" if all_of_them else "the chat template leaves out some of the tools",
        where="tools",
        remedy="Give them as a JSON text under 'tools' in the system message"
        if in_message
        else "Describe them in a message, or use a model whose template takes tools",
    )


def _other_form(given: Given, messages: list[object], index: int, render: Render) -> str:
    """What to do about a content the template does not take: the other form, if that works."""
    message = _object(messages[index])
    content = message["content"]
    other = "a" if isinstance(content, list) else [{"type": "text", "text": "a"}]
    form = "one text" if isinstance(content, list) else _PARTS
    changed = [{**_object(each), "content": other} if each is message else each for each in messages]
    marks = _Marks()
    text = render(_mark({**given, "messages": changed}, changed, marks))
    markers = marks.of.get(("content", index), [])
    if text is not None and markers and all(marker in text for marker in markers):
        return f"Give its content as {form}"
    if message["role"] == "system":
        return "Put its text at the beginning of the first user message"
    return _OWN


def refuse_media(given: Given) -> None:
    """Raises PromptError for a picture, sound or file in a message, whatever the template would make of it."""
    for index, message in enumerate(_list(given["messages"])):
        for part in _list(_object(message).get("content")):
            kind = str(_object(part).get("type", ""))
            if "text" not in _object(part) and any(word in kind for word in _MEDIA):
                raise PromptError(
                    f"a message holds a part of the type {kind[:60]!r}, and only text is read here",
                    where=f"message {index}",
                    remedy="Leave the part out",
                )


def _mark(given: Given, messages: list[object], marks: _Marks) -> dict[str, object]:
    """The same conversation with markers for texts."""
    marked: list[object] = []
    for index, message in enumerate(messages):
        changed = dict(_object(message))
        if "content" in changed:
            changed["content"] = _marked_content(changed["content"], index, marks)
        if "tools" in changed:
            tools = changed["tools"]
            changed["tools"] = marks.new("tools", index) if _full(tools) else _named(tools, "tools", index, marks)
        if "tool_calls" in changed:
            changed["tool_calls"] = _named(changed["tool_calls"], "tool_calls", index, marks)
        marked.append(changed)
    return {**given, "messages": marked, "tools": _named(given.get("tools"), "tools", None, marks)}


def _marked_content(content: object, index: int, marks: _Marks) -> object:
    if _full(content):
        return marks.new("content", index)
    if not isinstance(content, list):
        return content
    parts: list[object] = []
    for part in content:
        if _full(part):
            parts.append(marks.new("content", index))
        elif _full(_object(part).get("text")):
            parts.append({**_object(part), "text": marks.new("content", index)})
        else:
            parts.append(part)
    return parts


def _named(tools: object, what: str, index: int | None, marks: _Marks) -> object:
    """Tools or calls of tools, with markers for the names of the functions."""
    if not isinstance(tools, list):
        return tools
    named: list[object] = []
    for tool in tools:
        outer, function = _object(tool), _object(_object(tool).get("function"))
        if _full(function.get("name")):
            named.append({**outer, "function": {**function, "name": marks.new(what, index)}})
        elif _full(outer.get("name")):
            named.append({**outer, "name": marks.new(what, index)})
        else:
            named.append(tool)
    return named


def _full(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}
