"""Answers with tools: what holds the model to them, and the loop that calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.arguments import require_flag, require_integer
from edgephi.errors import UsageError
from edgephi.runtime.answer import Answer, Rules
from edgephi.runtime.grammar import Grammars, ResponseFormat
from edgephi.runtime.sampling import SamplingOptions
from edgephi.runtime.text.templates import Message, user_message
from edgephi.runtime.tools.formats import ToolFormat, assistant_message, calls_grammar, reader
from edgephi.runtime.tools.functions import ToolCall, ToolLike, call_messages, make_tools, result_messages

if TYPE_CHECKING:
    from edgephi.runtime.model import Model
    from edgephi.runtime.session import Session


@dataclass(frozen=True)
class ToolRun:
    """What `Model.run_tools` or `Session.run_tools` did."""

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
    parallel: bool = True,
) -> Rules:
    """What an answer has to keep to; arguments and errors are those of `Model.chat`."""
    require_flag("parallel_tool_calls", parallel)
    made = make_tools(tools)
    if not made and tool_choice == "auto":
        return Rules(grammars.grammar(response_format))
    if response_format is not None:
        raise UsageError("tools and response_format are given together", remedy="Leave one of them out")
    source = calls_grammar(form, made, tool_choice, parallel=parallel)
    read = reader(form, made)
    grammar = None if source is None else grammars.text_grammar("lark", source)
    return Rules(grammar, read if parallel else lambda text: read(text)[:1])


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
    conversation: list[Message] = [user_message(messages)] if isinstance(messages, str) else [*messages]

    def begin() -> Answer:
        return model.chat(conversation, tools=tools, tool_choice=tool_choice, adapter=adapter, **sampling).result()

    def go_on(answer: Answer, results: Sequence[str], offered: Sequence[ToolLike]) -> Answer:
        conversation.append(assistant_message(model.tool_format, answer.text, answer.tool_calls))
        conversation.extend(result_messages(call_messages(answer.tool_calls), results))
        return model.chat(conversation, tools=offered, adapter=adapter, **sampling).result()

    answer, calls = _rounds(tools, max_rounds, begin, go_on)
    return ToolRun(answer, (*conversation, {"role": "assistant", "content": answer.text}), calls)


def run_tools_in(session: Session, text: str, tools: Sequence[ToolLike], max_rounds: int, tool_choice: str) -> ToolRun:
    """See `Session.run_tools`."""
    answer, calls = _rounds(
        tools,
        max_rounds,
        lambda: session.say(text, tools=tools, tool_choice=tool_choice).result(),
        lambda answer, results, offered: session.give_results(results, tools=offered).result(),
    )
    return ToolRun(answer, session.messages, calls)


def _rounds(
    tools: Sequence[ToolLike],
    max_rounds: int,
    begin: Callable[[], Answer],
    go_on: Callable[[Answer, Sequence[str], Sequence[ToolLike]], Answer],
) -> tuple[Answer, tuple[ToolCall, ...]]:
    """The last answer, and all calls.

    Args:
        begin: gives the first answer.
        go_on: gives the next one, of the last answer, the results of its calls, and the tools that are offered again.
    """
    if require_integer("max_rounds", max_rounds) < 1:
        raise UsageError(f"max_rounds is {max_rounds}", remedy="Allow at least 1")
    made = {tool.name: tool for tool in make_tools(tools)}
    answer, calls = begin(), list[ToolCall]()
    for turn in range(1, max_rounds + 1):
        if not answer.tool_calls:
            break
        calls += answer.tool_calls
        results = [made[call.name].call(call.arguments) for call in answer.tool_calls]
        answer = go_on(answer, results, tools if turn < max_rounds else ())
    return answer, tuple(calls)
