"""A conversation: its messages, and the KV cache they have in common from turn to turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Unpack

from edgephi.arguments import require_text
from edgephi.errors import PromptError, PromptTooLongError
from edgephi.runtime.answer import Answer, Prompt, Rules, Stream
from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.grammar import ResponseFormat
from edgephi.runtime.sampling import Sampling, SamplingOptions, make_sampling
from edgephi.runtime.templates import Message, user_message

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
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._overflow, self._adapter = overflow, adapter
        self._system: tuple[Message, ...] = () if system is None else ({"role": "system", "content": system},)
        self._sequence: KvSequence | None = None
        self._stream: Stream | None = None
        self._messages: tuple[Message, ...] = (*self._system, *messages)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far; the answer being written is not in it yet. `Model.session(messages=...)` goes on
        with it, in another process too."""
        return self._messages

    def say(self, text: str, response_format: ResponseFormat | None = None) -> Stream:
        """Add a message and answer it. An earlier answer that was not read to its end is cancelled first.

        A cancelled answer stays in the conversation as far as it went. A message that cannot be answered does not
        enter the conversation.

        Args:
            response_format: what this answer has to be, as for `Model.chat`.

        Raises:
            GrammarError: the format cannot be enforced; it says why.
            PromptError: no text, the conversation is longer than the context (and may not be shortened), or the
                template refuses it.
            EngineError: the model is closed.
        """
        require_text("text", text, "the message as one text; `Model.chat` takes lists of messages", PromptError)
        rules = Rules(self._model.grammars.grammar(response_format))
        self._finish_answer()
        return self._answer((*self._messages, user_message(text)), self._sampling, rules)

    def regenerate(self, **sampling: Unpack[SamplingOptions]) -> Stream:
        """Answer the last message anew, in the place of the answer it has; that one stays when nothing comes of it.

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
        return self._answer(self._messages[: begins[-1] + 1], differently, Rules())

    def undo(self) -> str | None:
        """Take back the last message and its answer. Returns the message's text; None: there was none."""
        self._finish_answer()
        begins = self._begins(self._messages)
        if not begins:
            return None
        taken, self._messages = self._messages[begins[-1]], self._messages[: begins[-1]]
        return str(taken.get("content", ""))

    def _answer(self, asked: tuple[Message, ...], sampling: Sampling, rules: Rules) -> Stream:
        """Answer the last of these messages; they become the conversation when the answer ends."""
        messages, prompt = self._fitting(asked, sampling)

        def on_end(answer: Answer | None, sound: bool) -> None:
            if not sound:
                self._drop_cache()
            if answer is not None:
                self._messages = (*messages, {"role": "assistant", "content": answer.text})

        self._stream = self._model.stream(prompt, sampling, self._open_sequence, on_end, rules)
        return self._stream

    def fork(self) -> Session:
        """A second conversation that has begun like this one; what is said in one is not heard in the other. An answer
        that was not read to its end is cancelled first."""
        self._finish_answer()
        other = Session(self._model, self._sampling, None, self._messages, self._overflow, self._adapter)
        other._system = self._system
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

    def _fitting(self, messages: tuple[Message, ...], sampling: Sampling) -> tuple[tuple[Message, ...], Prompt]:
        """The messages, the oldest turns left out as far as they must and may be, and their prompt."""
        while True:
            try:
                prompt = self._model.prepare(partial(self._model.encode_chat, messages), sampling)
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
        start = len(messages[: len(self._system)])
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
