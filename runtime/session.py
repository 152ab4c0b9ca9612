"""A conversation: its messages, and the KV cache they have in common from turn to turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.arguments import require_text
from edgephi.errors import PromptError
from edgephi.runtime.answer import Answer, Prompt, Stream
from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.sampling import Sampling
from edgephi.runtime.templates import Message, user_message

if TYPE_CHECKING:
    from edgephi.runtime.model import Model


class Session:
    """Made by `Model.session`. Each `say` renders all messages again and computes only what the cache does not hold.

    The cache is sized for the turn; a conversation that outgrows it gets one of twice the size and computes its prompt
    once more (the answer's `reused_tokens` is then 0).
    """

    def __init__(self, model: Model, sampling: Sampling, system: str | None) -> None:
        self._model = model
        self._sampling = sampling
        self._system = system
        self._sequence: KvSequence | None = None
        self._stream: Stream | None = None
        self._messages: tuple[Message, ...] = ()
        self.reset()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far; the answer being written is not in it yet."""
        return self._messages

    def say(self, text: str) -> Stream:
        """Add a message and answer it. An earlier answer that was not read to its end is cancelled first.

        A cancelled answer stays in the conversation as far as it went. A message that cannot be answered does not
        enter the conversation.

        Raises:
            PromptError: no text, the conversation is longer than the context, or the template refuses it.
            EngineError: the model is closed.
        """
        require_text("text", text, "the message as one text; `Model.chat` takes lists of messages", PromptError)
        self._finish_answer()
        messages = (*self._messages, user_message(text))
        prompt = self._model.prepare(lambda: self._model.encode_chat(messages), self._sampling)

        def on_end(answer: Answer | None, sound: bool) -> None:
            if not sound:
                self._drop_cache()
            if answer is not None:
                self._messages = (*messages, {"role": "assistant", "content": answer.text})

        self._stream = self._model.stream(prompt, self._sampling, self._open_sequence, on_end)
        return self._stream

    def reset(self) -> None:
        """Forget all messages but the system's. The cache stays: the next prompt often begins alike."""
        self._finish_answer()
        self._messages = () if self._system is None else ({"role": "system", "content": self._system},)

    def close(self) -> None:
        """Free the KV cache; the messages stay, and saying more makes a new one."""
        self._finish_answer()
        self._drop_cache()

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
            self._sequence = self._model.answering_sequence(needed, prompt.tokens)
        return self._sequence

    def _drop_cache(self) -> None:
        if self._sequence is not None:
            self._sequence.close()
        self._sequence = None
