"""Answers with tools: what holds the model to them, and the loop that calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.arguments import require_integer
from edgephi.errors import UsageError
from edgephi.runtime.answer import Answer, Rules
from edgephi.runtime.grammar import Grammars, ResponseFormat
from edgephi.runtime.sampling import SamplingOptions
from edgephi.runtime.templates import Message, user_message
from edgephi.runtime.tool_formats import ToolFormat, answered, calls_grammar, reader
from edgephi.runtime.tools import ToolCall, ToolLike, make_tools

if TYPE_CHECKING:
    from edgephi.runtime.model import Model


@dataclass(frozen=True)
class ToolRun:
    """What `Model.run_tools` did."""

    answer: Answer
    """The last one, in words."""
    messages: tuple[Message, ...]
    """The whole conversation, calls and results included."""
    calls: tuple[ToolCall, ...]
    """That were made, in order."""


def make_rules(
    grammars: Grammars,
    form: ToolFormat | None,
    tools: Sequence[ToolLike] | None,
    tool_choice: str,
    response_format: ResponseFormat | None,
) -> Rules:
    """What an answer has to keep to; arguments and errors are those of `Model.chat`."""
    made = make_tools(tools)
    if not made and tool_choice == "auto":
        return Rules(grammars.grammar(response_format))
    if response_format is not None:
        raise UsageError("tools and response_format are given together", remedy="Leave one of them out")
    source = calls_grammar(form, made, tool_choice)
    return Rules(None if source is None else grammars.text_grammar("lark", source), reader(form, made))


def run_tools(
    model: Model,
    messages: str | Sequence[Message],
    tools: Sequence[ToolLike],
    max_rounds: int,
    tool_choice: str,
    adapter: str | None,
    sampling: SamplingOptions,
) -> ToolRun:
    """See `Model.run_tools`."""
    if require_integer("max_rounds", max_rounds) < 1:
        raise UsageError(f"max_rounds is {max_rounds}", remedy="Allow at least 1")
    conversation: list[Message] = [user_message(messages)] if isinstance(messages, str) else [*messages]
    made = {tool.name: tool for tool in make_tools(tools)}
    calls: list[ToolCall] = []
    for turn in range(max_rounds):
        choice = tool_choice if turn == 0 else "auto"
        answer = model.chat(conversation, tools=tools, tool_choice=choice, adapter=adapter, **sampling).result()
        if not answer.tool_calls:
            break
        calls += answer.tool_calls
        results = [made[call.name].call(call.arguments) for call in answer.tool_calls]
        conversation += answered(model.tool_format, answer.text, answer.tool_calls, results)
    else:
        answer = model.chat(conversation, **sampling).result()
    return ToolRun(answer, (*conversation, {"role": "assistant", "content": answer.text}), tuple(calls))
