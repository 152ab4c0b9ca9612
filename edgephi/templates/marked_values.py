"""A template's values with marks in what looks like a control token; see `edgephi/tokenizer/control_tokens.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgephi.tokenizer.control_tokens import ControlTokens, other_mark

_NAMES = frozenset({"role", "type"})
"""What templates build tokens of (`'<|' + role + '|>'`) or compare; an app chooses them, not who writes the text."""
_NONE: frozenset[str] = frozenset()


class Unclear(Exception):
    """What the template writes tells nothing about the texts."""


def apart(
    given: Mapping[str, object],
    plain: str,
    control: ControlTokens,
    kept: Callable[[], frozenset[str]],
    render: Callable[[Mapping[str, object]], str | None],
) -> tuple[str, str | None]:
    """What a template writes, with marks in the control tokens of texts, and the mark; None where there are none.

    Args:
        plain: what the template writes of the values as they are.
        kept: gives those of `mark_values`.
        render: the template; None when it refuses the values.

    Raises:
        Unclear: the template takes texts with marks apart.
    """
    if mark_values(given, control, control.mark, _NONE) == given and not control.after_normalizer:
        return plain, None
    mark = control.unused_mark([plain, repr(given)])
    tokens = kept()
    for edges in (True, False):
        text = render(mark_values(given, control, mark, tokens, edges=edges))
        if text is not None and text.replace(mark, "") == plain:
            return text, mark
    # the template looks for a token in a text, such as Qwen3's for <tool_response>: there it is to see none
    other = other_mark(mark)
    texts = [render(mark_values(given, control, each, tokens)) for each in (mark, other)]
    if texts[0] is None or texts[1] is None or texts[0].replace(mark, "") != texts[1].replace(other, ""):
        raise Unclear
    return texts[0], mark


def mark_values(
    given: Mapping[str, object], control: ControlTokens, mark: str, kept: frozenset[str], *, edges: bool = True
) -> dict[str, object]:
    """A template's values with marks in the control tokens of messages and tools.

    Args:
        kept: tokens that stay tokens where the content of an assistant's message is a text.
        edges: as of `ControlTokens.marked`.
    """

    def marked(value: object, edges: bool = edges) -> object:
        if isinstance(value, str):
            return control.marked(value, mark, kept=_NONE, edges=edges)
        if isinstance(value, list):
            return [marked(item, edges) for item in value]
        if isinstance(value, dict):
            return {
                control.marked(key, mark, kept=_NONE, edges=False): marked(item, edges and key not in _NAMES)
                for key, item in value.items()
            }
        return value

    def said(message: object) -> object:
        changed = marked(message)
        if isinstance(message, dict) and isinstance(changed, dict) and message.get("role") == "assistant":
            content = message.get("content")
            if isinstance(content, str):
                changed["content"] = control.marked(content, mark, kept=kept, edges=edges)
        return changed

    messages = given["messages"]
    changed = [said(message) for message in messages] if isinstance(messages, list) else []
    return {**given, "messages": changed, "tools": marked(given.get("tools"))}
