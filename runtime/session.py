"""A conversation: its messages, and the KV cache they have in common from turn to turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, Unpack

from edgephi.arguments import require_text, require_texts, wrong
from edgephi.errors import PromptError, PromptTooLongError, UsageError
from edgephi.runtime.answer import Answer, Prompt, Rules
from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.grammar import ResponseFormat
from edgephi.runtime.sampling import Sampling, SamplingOptions, make_sampling
from edgephi.runtime.stream import Stream
from edgephi.runtime.text.templates import Message, user_message
from edgephi.runtime.tools.formats import assistant_message
from edgephi.runtime.tools.functions import ToolLike, result_messages, with_read_arguments
from edgephi.runtime.tools.run import ToolRun, make_rules, run_tools_in

if TYPE_CHECKING:
    from edgephi.runtime.adapters import Adapter
    from edgephi.runtime.model import Model

Overflow = Literal["error", "drop_oldest", "summarize"]

SUMMARY_TOKENS = 200
SUMMARY = "Summary of the conversation so far: "
"""What the message begins with that stands for the turns it sums up."""
ASKED = (
    "Summarize the conversation below in a few sentences, so that it can go on without its beginning. Keep names, "
    "numbers and decisions.\n\n"
)


@dataclass(frozen=True)
class _Wanted:
    """What `say` was given beside its message, for whoever wants another answer to it."""

    message: Message
    tools: Sequence[ToolLike] | None = None
    tool_choice: str | None = None
    response_format: ResponseFormat | None = None


class Session:
    """Made by `Model.session`. Each `say` renders all messages again and computes only what the cache does not hold.

    The cache is sized for the turn. An engine that cannot make one larger computes the prompt of a conversation that
    outgrows it once more, in one of twice the size (the answer's `reused_tokens` is then 0).
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        system: str | None,
        messages: Sequence[Message] = (),
        overflow: Overflow = "error",
        adapter: Adapter | None = None,
        tools: Sequence[ToolLike] | None = None,
        tool_choice: str = "auto",
    ) -> None:
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise wrong("messages", messages, "a list of messages, such as Session.messages", PromptError)
        for message in messages:
            if not isinstance(message, Mapping):
                raise wrong("a message", message, "messages like {'role': 'user', 'content': 'Hello'}", PromptError)
        self._model = model
        self.tools, self._tool_choice = tuple(tools or ()), tool_choice
        """What the model may ask to have called, unless an answer is given tools of its own."""
        self._sampling = sampling
        self._overflow, self._adapter = overflow, adapter
        self._system: tuple[Message, ...] = () if system is None else ({"role": "system", "content": system},)
        self._sequence: KvSequence | None = None
        self._stream: Stream | None = None
        self._messages: tuple[Message, ...] = (*self._system, *messages)
        self._wanted: tuple[_Wanted, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far; the answer being written is not in it yet. `Model.session(messages=...)` goes on
        with it, in another process too. Calls and results are as OpenAI has them, with arguments as objects."""
        return self._messages

    def say(
        self,
        text: str,
        response_format: ResponseFormat | None = None,
        *,
        tools: Sequence[ToolLike] | None = None,
        tool_choice: str | None = None,
    ) -> Stream:
        """Add a message and answer it. An earlier answer that was not read to its end is cancelled first.

        A cancelled answer stays in the conversation as far as it went. A message that cannot be answered does not
        enter the conversation. An answer's `tool_calls` wait for `give_results`.

        Args:
            response_format: what this answer has to be, as for `Model.chat`. It then calls none of the session's tools.
            tools: for this answer in the place of the session's; an empty list for none. The prompt begins otherwise
                with them, and is computed again.
            tool_choice: for this answer, as for `Model.chat`.

        Raises:
            GrammarError: the format, or the schema of a tool, cannot be enforced; it says why.
            PromptError: no text, the conversation is longer than the context (and may not be shortened), or the
                template refuses it.
            UsageError: tools together with a format, or a tool that cannot be described.
            EngineError: the model is closed.
        """
        require_text("text", text, "the message as one text; `Model.chat` takes lists of messages", PromptError)
        rules = self._rules(tools, tool_choice, response_format)
        self._finish_answer()
        message = user_message(text)
        stream = self._answer((*self._messages, message), self._sampling, tools, rules)
        there = {id(one) for one in self._messages}
        kept = [one for one in self._wanted if id(one.message) in there]
        self._wanted = (*kept, _Wanted(message, tools, tool_choice, response_format))
        return stream

    def regenerate(self, **sampling: Unpack[SamplingOptions]) -> Stream:
        """Answer the last message anew, with the format or the tools that `say` was given for it, in the place of the
        answer it has; that one stays when nothing comes of it.

        Args:
            sampling: what is different for this answer. Greedy decoding, and the same seed, give the same answer.

        Raises:
            UsageError: a sampling argument outside its range.
            PromptError: there is no message, or as `say`.
            EngineError: the model is closed.
        """
        make_sampling(sampling)  # refuses names that are none
        differently = replace(self._sampling, **sampling)
        self._finish_answer()
        begins = self._begins(self._messages)
        if not begins:
            raise PromptError("there is no message to answer again", remedy="Say something first")
        message = self._messages[begins[-1]]
        wanted = next((one for one in self._wanted if one.message is message), _Wanted(message))
        rules = self._rules(wanted.tools, wanted.tool_choice, wanted.response_format)
        return self._answer(self._messages[: begins[-1] + 1], differently, wanted.tools, rules, again=True)

    def undo(self) -> str | None:
        """Take back the last message and its answer. Returns the message's text; None: there was none."""
        self._finish_answer()
        begins = self._begins(self._messages)
        if not begins:
            return None
        taken, self._messages = self._messages[begins[-1]], self._messages[: begins[-1]]
        return str(taken.get("content", ""))

    def give_results(
        self, results: Sequence[str], *, tools: Sequence[ToolLike] | None = None, tool_choice: str | None = None
    ) -> Stream:
        """Add the results of the calls that the last answer asked for, and answer them.

        Args:
            results: texts, one for each of its `tool_calls` in their order.
            tools: as for `say`.
            tool_choice: as for `Model.chat`, and not the session's: whoever has to call tools never answers.

        Raises:
            UsageError: the last message asks for no calls, or for another number of them.
            EdgephiError: as `say`.
        """
        require_texts("results", results, "a list of texts, one for each call")
        self._finish_answer()
        calls = self._messages[-1].get("tool_calls") if self._messages else None
        if not isinstance(calls, Sequence) or len(calls) != len(results):
            asked = len(calls) if isinstance(calls, Sequence) else 0
            raise UsageError(
                f"there are {len(results)} results, and the last message asks for {asked} calls",
                remedy="Give one result for each of the answer's tool_calls",
            )
        calls = [with_read_arguments(call) for call in calls]
        rules = self._rules(tools, tool_choice or "auto", None)
        return self._answer((*self._messages, *result_messages(calls, results)), self._sampling, tools, rules)

    def run_tools(
        self,
        text: str,
        *,
        tools: Sequence[ToolLike] | None = None,
        max_rounds: int = 5,
        tool_choice: str | None = None,
    ) -> ToolRun:
        """Say something, call the functions that the model asks for, and give it their results, until it answers in
        words: `Model.run_tools` in this conversation.

        Args:
            tools: functions, in the place of the session's.
            max_rounds: answers with calls, at most; in one more no tool is offered.
            tool_choice: of the first answer.

        Raises:
            EdgephiError: as `say`; what a function raises passes.
        """
        choice = tool_choice or (self._tool_choice if tools is None else "auto")
        return run_tools_in(self, text, self.tools if tools is None else tools, max_rounds, choice)

    def fork(self) -> Session:
        """A second conversation that has begun like this one; what is said in one is not heard in the other. An answer
        that was not read to its end is cancelled first."""
        self._finish_answer()
        other = Session(
            self._model,
            self._sampling,
            None,
            self._messages,
            self._overflow,
            self._adapter,
            self.tools,
            self._tool_choice,
        )
        other._system, other._wanted = self._system, self._wanted
        if self._sequence is not None and self._model.engine.abilities.fork:
            other._sequence = self._sequence.fork(speculate=True)
        return other

    def reset(self) -> None:
        """Forget all messages but the system's. The cache stays: the next prompt often begins alike."""
        self._finish_answer()
        self._messages = self._system

    def set_sampling(self, **sampling: Unpack[SamplingOptions]) -> None:
        """How the answers from now on are decoded. The arguments are those of `Sampling`.

        Raises:
            UsageError: a sampling argument outside its range.
        """
        self._sampling = make_sampling(sampling)

    def close(self) -> None:
        """Free the KV cache; the messages stay, and saying more makes a new one."""
        self._finish_answer()
        self._drop_cache()

    def _rules(
        self, tools: Sequence[ToolLike] | None, tool_choice: str | None, response_format: ResponseFormat | None
    ) -> Rules:
        """What an answer has to keep to; the arguments are those of `say`."""
        model = self._model
        if response_format is not None and tools is None and tool_choice is None:
            return Rules(model.grammars.grammar(response_format))
        choice = tool_choice or (self._tool_choice if tools is None else "auto")
        offered = self.tools if tools is None else tools
        return make_rules(model.grammars, model.tool_format, offered, choice, response_format)

    def _answer(
        self,
        asked: tuple[Message, ...],
        sampling: Sampling,
        tools: Sequence[ToolLike] | None,
        rules: Rules,
        *,
        again: bool = False,
    ) -> Stream:
        """Answer the last of these messages; they become the conversation when the answer ends.

        Args:
            again: it has an answer already, which stays where this one is cancelled before it says anything.
        """
        messages, prompt = self._fitting(asked, sampling, self.tools if tools is None else tools)

        def on_end(answer: Answer | None, sound: bool) -> None:
            if not sound:
                self._drop_cache()
            if answer is not None and not (again and answer.finish == "cancelled" and not answer.text):
                said = assistant_message(self._model.tool_format, answer.text, answer.tool_calls)
                self._messages = (*messages, said)

        self._stream = self._model.stream(prompt, sampling, self._open_sequence, on_end, rules)
        return self._stream

    def _fitting(
        self, messages: tuple[Message, ...], sampling: Sampling, tools: Sequence[ToolLike]
    ) -> tuple[tuple[Message, ...], Prompt]:
        """The messages, the oldest turns left out as far as they must and may be, and their prompt."""
        while True:
            try:
                encode = partial(self._model.encode_chat, messages, tools=tools)
                prompt = self._model.prepare(encode, sampling)
            except PromptTooLongError:
                shorter = self._shortened(messages)
                if shorter is None:
                    raise
            else:
                # an answer wants room too: what was asked for, or a quarter of the context
                wanted = min(sampling.max_new_tokens, self._model.context_length // 4)
                shorter = self._shortened(messages) if prompt.max_new_tokens < wanted else None
                if shorter is None:
                    return messages, prompt
            messages = shorter

    def _shortened(self, messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
        """The messages without their oldest turn, or with a summary for their older half; None: not possible."""
        if self._overflow == "error":
            return None
        # system messages stay, those too that came with a saved conversation
        start = sum(1 for _ in takewhile(lambda message: message.get("role") == "system", messages))
        begins = self._begins(messages)
        if len(begins) < 2:  # the newest one stays
            return None
        if self._overflow == "drop_oldest":
            return (*messages[:start], *messages[begins[1] :])
        return self._summarized(messages, start, begins)

    def _begins(self, messages: Sequence[Message]) -> list[int]:
        """Places where a turn begins, which a user's message does."""
        start = len(self._system)
        return [place for place in range(start, len(messages)) if messages[place].get("role") == "user"]

    def _summarized(
        self, messages: tuple[Message, ...], start: int, begins: Sequence[int]
    ) -> tuple[Message, ...] | None:
        cut = begins[max(1, len(begins) // 2)]
        old = messages[start:cut]
        if len(old) == 2 and str(old[0].get("content", "")).startswith(SUMMARY):
            return (*messages[:start], *messages[cut:])  # a summary alone cannot be made shorter: it goes
        room = max(1, self._model.context_length // 2)
        text = "\n".join(f"{message.get('role')}: {message.get('content')}" for message in old)
        while self._model.count_tokens(ASKED + text) > room and len(text) > 200:
            text = text[len(text) // 4 :]  # the beginning of what is to be forgotten goes first
        limit = min(SUMMARY_TOKENS, max(1, self._model.context_length // 8))
        summary = self._model.chat(ASKED + text, max_new_tokens=limit).result().text.strip()
        stands_for: tuple[Message, ...] = (
            {"role": "user", "content": SUMMARY + summary},
            {"role": "assistant", "content": "Understood."},
        )
        return (*messages[:start], *stands_for, *messages[cut:])

    def _finish_answer(self) -> None:
        if self._stream is not None and not self._stream.finished:
            self._stream.cancel()
            self._stream.result()
        self._stream = None

    def _open_sequence(self, prompt: Prompt) -> KvSequence:
        needed = len(prompt.tokens) + prompt.max_new_tokens
        if self._sequence is not None and self._sequence.capacity < needed:
            needed = max(needed, 2 * self._sequence.capacity)
            self._drop_cache()
        if self._sequence is None:
            self._sequence = self._model.answering_sequence(needed, prompt.tokens, self._adapter)
        return self._sequence

    def _drop_cache(self) -> None:
        if self._sequence is not None:
            self._sequence.close()
        self._sequence = None
