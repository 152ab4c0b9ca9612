"""One answer, computed in a thread of its own while the event loop hands its pieces on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from edgephi.runtime.answer import Answer
from edgephi.runtime.moderation import NO_MODERATION, HeldText, Moderation
from edgephi.runtime.sampling import TokenLogprobs
from edgephi.runtime.stream import Stream


@dataclass(frozen=True)
class Piece:
    """Text of an answer, whole characters."""

    text: str
    logprobs: Sequence[TokenLogprobs] = ()
    """Of the tokens since the last piece, if they were asked for."""


@dataclass(frozen=True)
class _Started:
    prompt_tokens: int


class Generation(AsyncIterator[Piece]):
    """The pieces of an answer. Whoever has one ends it with `cancel` or by iterating to its end.

    Args:
        ask: makes the stream; it and the stream run in the thread that calls `run`.
        on_end: called in the event loop when the thread is done, with the answer (None: an error), before who reads is
            told of the end: a client that has its answer finds its place in the queue free.
        moderation: judges the answer before it is told, sentence by sentence, in the same thread.
    """

    def __init__(
        self, ask: Callable[[], Stream], on_end: Callable[[Answer | None], None], moderation: Moderation
    ) -> None:
        self._ask: Callable[[], Stream] | None = ask
        self._on_end, self._moderation = on_end, moderation
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[_Started | Piece | Answer | Exception] = asyncio.Queue()
        self._stream: Stream | None = None
        self._cancelled = self._ended = False
        self._result: Answer | None = None
        self.prompt_tokens = 0
        self.is_blocked = False
        """The moderator did not allow the rest of the answer."""

    def run(self) -> None:
        """Compute the answer; called once, in a thread."""
        outcome: Answer | Exception | None = None
        try:
            assert self._ask is not None
            stream, self._ask = self._ask(), None
            self._stream = stream
            if self._cancelled:
                stream.cancel()
            self._tell(_Started(stream.prompt_tokens))
            outcome = self._tell_pieces(stream) if self._is_free else self._tell_judged(stream)
        except Exception as error:
            outcome = error
        finally:
            self._ask = self._stream = None  # they hold the model
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._end, outcome)

    @property
    def _is_free(self) -> bool:
        return self._moderation.moderator is NO_MODERATION

    def _tell_pieces(self, stream: Stream) -> Answer:
        told = 0
        for text in stream:
            logprobs = stream.logprobs[told:]
            told += len(logprobs)
            self._tell(Piece(text, logprobs))
        answer = stream.result()
        if rest := stream.logprobs[told:]:  # of tokens without a text of their own
            self._tell(Piece("", rest))
        return answer

    def _tell_judged(self, stream: Stream) -> Answer:
        """As `_tell_pieces`. What is blocked is in no piece, and neither in the answer; log probabilities name tokens,
        so they wait with their text."""
        held, given, told = HeldText(self._moderation), "", 0
        for text in stream:
            if allowed := held.push(text):
                given += allowed
                self._tell(Piece(allowed, stream.logprobs[told:]))
                told = len(stream.logprobs)
            if held.blocked:
                stream.cancel()
                break
        answer = stream.result()
        rest = held.finish()
        if held.blocked:
            self.is_blocked = True
            return replace(answer, text=given, logprobs=answer.logprobs[:told], parsed=None, tool_calls=())
        if rest or answer.logprobs[told:]:
            self._tell(Piece(rest, answer.logprobs[told:]))
        return answer

    async def started(self) -> None:
        """Wait until the prompt is tokenized and checked; what is wrong with the request is raised here."""
        first = await self._events.get()
        if isinstance(first, Exception):
            raise first
        assert isinstance(first, _Started)
        self.prompt_tokens = first.prompt_tokens

    async def __anext__(self) -> Piece:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Piece):
            return event
        assert isinstance(event, Answer)
        self._result = event
        raise StopAsyncIteration

    @property
    def answer(self) -> Answer:
        """Of a generation that was iterated to its end."""
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Stop computing, in the prompt too; nobody reads the rest."""
        self._cancelled = True
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def fail(self, error: Exception) -> None:
        """Stop computing; who reads gets this error."""
        if not self._ended:
            self._events.put_nowait(error)
            self.cancel()

    def _tell(self, event: _Started | Piece) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and with it all who listen
            self.cancel()

    def _end(self, outcome: Answer | Exception | None) -> None:
        self._ended = True
        self._on_end(outcome if isinstance(outcome, Answer) else None)
        if outcome is not None:
            self._events.put_nowait(outcome)
