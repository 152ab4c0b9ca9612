"""What all endpoints share: the models, the queue, the running answers, and the way a request becomes an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from edgephi.errors import PromptTooLongError
from edgephi.runtime.answer import Answer
from edgephi.runtime.model import Model
from edgephi.runtime.moderation import Moderation
from edgephi.runtime.sampling import TokenLogprobs
from edgephi.runtime.server.conversation import Conversation, Message, logprob_entries
from edgephi.runtime.server.errors import RequestError
from edgephi.runtime.server.generation import Generation
from edgephi.runtime.server.limits import Gate, Receive, unless_gone
from edgephi.runtime.server.metrics import Metrics
from edgephi.runtime.server.models import ModelPool, Source
from edgephi.runtime.server.response_store import ResponseStore
from edgephi.runtime.server.settings import ServerSettings
from edgephi.runtime.stream import Stream

Made = TypeVar("Made")


class Answering(Generation):
    """A generation, and what its endpoint needs of the model, which may be unloaded before the answer is read."""

    def __init__(
        self,
        model: Model,
        ask: Callable[[Model], Stream],
        on_end: Callable[[Answer | None], None],
        moderation: Moderation,
    ) -> None:
        super().__init__(lambda: ask(model), on_end, moderation)
        self.tool_format = model.tool_format
        # the tokenizer can be asked after the model was closed
        self._tokenizer, self._stop_ids = model.tokenizer, model.stop_ids

    def logprobs(self, tokens: Sequence[TokenLogprobs]) -> list[dict[str, object]]:
        """As chat completions and responses show them."""
        return logprob_entries(self._tokenizer, self._stop_ids, tokens)

    def text_of(self, token: int) -> str:
        """How a token is written; U+FFFD for bytes that are no character alone."""
        return self._tokenizer.decode([token], special=True)

    def stop_text(self, answer: Answer, stops: Sequence[str]) -> str | None:
        """Which of the texts that were asked for ended an answer; None: none did."""
        if not stops or not answer.token_ids or answer.token_ids[-1] in self._stop_ids:
            return None
        behind = self._tokenizer.decode(answer.token_ids)[len(answer.text) :]
        return next((stop for stop in stops if behind.startswith(stop)), None)


class Service:
    """A server without its routes. Used in one event loop.

    Args:
        models: by name.
        settings: its bounds.
        adapters: files of LoRA adapters, by the model's name and their own.
        moderation: judges prompts and answers.
    """

    def __init__(
        self,
        models: Mapping[str, Source],
        settings: ServerSettings,
        adapters: Mapping[str, Mapping[str, Path | str]],
        moderation: Moderation,
    ) -> None:
        self.settings, self.moderation = settings, moderation
        self.metrics = Metrics()
        self.pool = ModelPool(models, adapters, settings, self.metrics)
        self.gate = Gate(settings.parallel, settings.queue, settings.queue_s)
        self._short = Gate(settings.parallel, settings.queue, settings.queue_s)
        """Of what computes no answer; it does not wait for those that do."""
        self.store = ResponseStore(settings.stored_responses, settings.stored_bytes)
        self._threads = ThreadPoolExecutor(settings.parallel, thread_name_prefix="answer")
        self._running: set[Generation] = set()
        self.metrics.watch(lambda: self.gate.running, lambda: self.gate.waiting)

    @property
    def draining(self) -> bool:
        """Whether nobody new is answered, because the server ends."""
        return self.gate.closed

    def choose(self, name: object, conversation: Conversation) -> tuple[str, Conversation]:
        """The model's name, and the conversation with the adapter that answers it; errors as of `ModelPool.find`."""
        model, arguments = self.with_adapter(name, conversation.arguments)
        return model, replace(conversation, arguments=arguments)

    def with_adapter(self, name: object, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """As `choose`, of arguments of `Model.chat` or `Model.generate`."""
        model, adapter = self.pool.find(name, arguments.get("adapter"))
        return model, {**arguments, **({} if adapter is None else {"adapter": adapter})}

    async def answer(
        self,
        receive: Receive,
        name: str,
        ask: Callable[[Model], Stream],
        prompt: str | Sequence[Message],
        param: str = "messages",
    ) -> Answering:
        """Queue up, wake the model, and start an answer.

        Args:
            receive: of the request; a client that leaves leaves the queue, and its prompt is not computed on.
            name: of the model.
            ask: what to ask it; called in a thread.
            prompt: what it is asked, for the moderator.
            param: what the interface calls that.

        Raises:
            RequestError: the queue is full, there is no such model, or the server ends.
            EdgephiError: the model cannot be loaded, or the request cannot be answered.
            ClientGone: the client left.
        """

        def ask_judged(model: Model) -> Stream:
            if (blocked := self.moderation.check_prompt(prompt)) is not None:
                raise RequestError(
                    f"the prompt is not allowed: {blocked.category.replace('_', ' ')}",
                    remedy="Ask something else",
                    param=param,
                    code="content_filter",
                )
            try:
                return ask(model)
            except PromptTooLongError as problem:
                raise RequestError(
                    problem.what, remedy=problem.remedy, param=param, code="context_length_exceeded"
                ) from None

        self.pool.entry(name)  # a wrong name is not to wait
        return await unless_gone(receive, self._start(name, ask_judged))

    async def _start(self, name: str, ask: Callable[[Model], Stream]) -> Answering:
        await self.gate.enter()
        entered = time.monotonic()
        try:
            model = await self.pool.acquire(name)
        except BaseException:
            self.gate.leave(None)
            raise
        alarm: asyncio.TimerHandle | None = None

        def ended(answer: Answer | None) -> None:
            if alarm is not None:
                alarm.cancel()
            self._running.discard(generation)
            self.pool.release(name)
            self.gate.leave(time.monotonic() - entered)
            self.metrics.count(name, answer)

        generation = Answering(model, ask, ended, self.moderation)
        self._running.add(generation)
        alarm = asyncio.get_running_loop().call_later(self.settings.answer_s, generation.fail, self._too_long())
        self._threads.submit(generation.run)
        try:
            await generation.started()
        except BaseException:
            generation.cancel()
            raise
        return generation

    async def with_model(self, receive: Receive, name: str, work: Callable[[Model], Made]) -> Made:
        """Something short that needs a model but computes no answer, in a thread; errors as of `answer`."""

        async def awake() -> Made:
            await self._short.enter()
            try:
                model = await self.pool.acquire(name)
            except BaseException:
                self._short.leave(None)
                raise
            working = asyncio.ensure_future(asyncio.to_thread(work, model))
            working.add_done_callback(ended)
            return await asyncio.shield(working)  # a thread goes on when its client leaves

        def ended(working: asyncio.Future[Made]) -> None:
            self.pool.release(name)
            self._short.leave(None)
            if not working.cancelled():
                working.exception()  # whose client left is told to nobody

        self.pool.entry(name)
        return await unless_gone(receive, awake())

    def drain(self) -> None:
        """Refuse what is new and what waits. Answers under way may finish, within `drain_s`; then they end with an
        error."""
        if not self.draining:
            self.gate.close()
            self._short.close()
            asyncio.get_running_loop().call_later(self.settings.drain_s, self._end_answers)

    def _end_answers(self) -> None:
        for generation in list(self._running):
            generation.fail(
                RequestError("the server ended before the answer did", remedy="Ask again", status=503, code="ending")
            )

    async def close(self) -> None:
        """End all answers and unload the models."""
        self.gate.close()
        self._short.close()
        self._end_answers()
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.sleep(0)  # what the threads told the loop at their end comes first
        await self.pool.close()

    def _too_long(self) -> RequestError:
        return RequestError(
            f"the answer took longer than {self.settings.answer_s:g} s",
            remedy="Ask for fewer tokens",
            status=504,
            code="answer_timeout",
        )


async def finish(receive: Receive, generation: Generation) -> Answer:
    """The whole answer; a client that leaves cancels it.

    Raises:
        EdgephiError: the runtime failed, or it took too long.
        ClientGone: the client left.
    """

    async def whole() -> Answer:
        async for _ in generation:
            pass
        return generation.answer

    waiting: Awaitable[Answer] = whole()
    try:
        return await unless_gone(receive, waiting)
    finally:
        generation.cancel()
