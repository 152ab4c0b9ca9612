"""An answer while it is written: tokens are computed one after the other, and become text with statistics."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from edgephi.runtime.answer import Answer, Finish, Prompt, Rules
from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.grammar import why_invalid
from edgephi.runtime.sampling import Sampler, Sampling, TokenLogprobs
from edgephi.runtime.text.endings import Repetition, StopTexts
from edgephi.runtime.text.tokenizer import Tokenizer
from edgephi.runtime.tools.functions import ToolCall

if TYPE_CHECKING:
    from edgephi.runtime.adapters import Adapter
    from edgephi.runtime.model import Model

Made = TypeVar("Made")


class Stream(Iterator[str], AsyncIterator[str]):
    """Pieces of text, whole characters each; computing happens while it is iterated.

    `async for` computes in a thread beside the event loop; a task that is cancelled cancels the answer.

    Args:
        prompt: what to answer.
        open_sequence: gives the sequence to use, whatever its cache holds.
        on_end: called with the answer (None: the runtime failed) and whether the sequence may be used again; once, or
            again where Ctrl-C struck in it.
        provider, prefill_provider, rejected: for the answer's statistics.
        rules: what the answer has to be. Tokens that a grammar leaves no choice about are not computed one by one: they
            enter the sequence together, before the next one that is.

    Raises (on iteration):
        EngineError: the model was closed, or the runtime failed.
        GrammarError: the model's vocabulary cannot write what the grammar wants.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampling: Sampling,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        open_sequence: Callable[[Prompt], KvSequence],
        on_end: Callable[[Answer | None, bool], None],
        *,
        provider: str = "cpu",
        prefill_provider: str | None = None,
        rejected: tuple[str, ...] = (),
        rules: Rules | None = None,
    ) -> None:
        self._prompt = prompt
        rules = rules or Rules()
        self._grammar, self._read_calls = rules.grammar, rules.read_calls
        # a token that was not chosen has no log probability: where they are asked for, all tokens are
        self._jumps = sampling.logprobs is None
        self._entering: list[int] = []
        """Tokens of the answer that nobody had to choose, and that the sequence does not have yet."""
        self._choose = Sampler(sampling, prompt.tokens, rules.grammar.restrict if rules.grammar else None)
        self._stops = StopTexts(sampling.stop)
        self._repetition = Repetition() if sampling.stop_repetition else None
        self._text = tokenizer.stream()
        self._stop_ids = stop_ids
        self._open_sequence = open_sequence
        self._on_end = on_end
        self._provider, self._rejected = provider, rejected
        self._prefill_provider = prefill_provider or provider
        self._sequence: KvSequence | None = None
        self._reused = 0
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._closed = False
        """By one of the stop texts: nothing of what was held back belongs to the answer."""
        self._handover, self._computing = threading.Lock(), threading.RLock()
        """The second is for who asks while what a cancelled task left is freed beside."""
        self._cancelled = False
        self._elapsed = prompt.prepare_s
        self._first: float | None = None
        self._before_first = 0
        """Tokens that stood before the first one that was computed."""
        self._answer: Answer | None = None
        self._failure: Exception | None = None

    def __next__(self) -> str:
        with self._computing:
            while self._answer is None:
                if self._failure:
                    raise self._failure
                if piece := self._advance():
                    return piece
        raise StopIteration

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> str:
        piece = await self._beside(lambda: next(self, None))
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def whole(self) -> Answer:
        """The whole answer, for `await`; computes what is left of it in a thread beside the event loop."""
        return await self._beside(self.result)

    async def _beside(self, work: Callable[[], Made]) -> Made:
        """Work in a thread. After a cancel nobody asks any more, so what the answer holds is freed by whoever is last:
        the thread, or where it has not begun or has just ended, another one."""
        import asyncio  # every load would wait for it, and few programs ask in this way

        works = left = False

        def until_cancelled() -> Made:
            nonlocal works
            with self._handover:
                if left:
                    raise asyncio.CancelledError
                works = True
            try:
                return work()
            finally:
                with self._handover:
                    works = False
                    last = left
                if last and not self.finished:
                    self.result()

        try:
            return await asyncio.to_thread(until_cancelled)
        except asyncio.CancelledError:
            with self._handover:
                left = True
                self.cancel()
                last = not works
            if last and not self.finished:
                asyncio.get_running_loop().run_in_executor(None, self.result)
            raise

    def cancel(self) -> None:
        """Stop after the token or the piece of prompt being computed. Any thread or signal handler may call it."""
        self._cancelled = True
        sequence = self._sequence  # read once: the answer may end meanwhile
        if sequence is not None:
            sequence.interrupt()

    def result(self) -> Answer:
        """The whole answer; computes what is left of it."""
        for _ in self:
            pass
        assert self._answer is not None
        return self._answer

    @property
    def finished(self) -> bool:
        return self._answer is not None or self._failure is not None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._prompt.tokens)

    @property
    def logprobs(self) -> Sequence[TokenLogprobs]:
        """Of the tokens so far, if they were asked for."""
        return self._choose.logprobs

    def _advance(self) -> str:
        """One token further, or several that need no step; the text they complete."""
        started = perf_counter()
        written = len(self._pieces)
        try:
            tokens = self._forced() or self._compute()
            self._take(tokens, perf_counter() - started)
        except Exception as error:
            self._failure = error
            self._on_end(None, False)
            raise
        except BaseException:
            # Ctrl-C may have struck between the runtime and our record of what its cache holds, or at the answer's end
            if self._answer is None:
                self._end("cancelled", perf_counter() - started, sound=False)
            else:
                self._on_end(self._answer, False)
            raise
        return "".join(self._pieces[written:])

    def _take(self, tokens: list[int] | None, seconds: float) -> None:
        """Enter tokens that were computed or forced (None: cancelled), and how long they took."""
        finish: Finish | None = "cancelled" if tokens is None else None
        for token in tokens or ():
            self._ids.append(token)
            finish = self._push(token)
            if finish is not None:
                break
        if tokens and not self._closed and self._grammar is not None and self._grammar.finished:
            finish = "stop"
        if finish is None:
            self._elapsed += seconds
        else:
            self._end(finish, seconds)

    def _push(self, token: int) -> Finish | None:
        """Take a token's text; what ends the answer with it."""
        if token in self._stop_ids:
            return "stop"
        text, stopped = self._stops.push(self._text.push(token))
        self._pieces.append(text)
        if stopped:
            self._closed = True
            return "stop"
        if len(self._ids) == self._prompt.max_new_tokens:
            return "length"
        # a token that nobody chose is no sign that the model is stuck
        if self._repetition is not None and not self._entering and self._repetition.push(token):
            return "repetition"
        return None

    def _forced(self) -> list[int] | None:
        """Tokens that the grammar leaves no choice about."""
        if self._grammar is None or not self._jumps or self._cancelled:
            return None
        forced = self._grammar.forced(self._prompt.max_new_tokens - len(self._ids))
        for token in forced:
            self._choose.append(token)
        self._entering = [*self._entering, *forced]
        return forced

    def _compute(self) -> list[int] | None:
        """The next token, or None when cancelled first."""
        if self._cancelled:
            return None
        started = perf_counter()
        if self._sequence is None:
            self._sequence = self._open_sequence(self._prompt)
            if self._cancelled:  # before there was a sequence to interrupt
                return None
            self._reused = self._sequence.reuse(self._prompt.tokens)
            new = [*self._prompt.tokens[self._reused :], *self._entering]
        else:
            # enters the last token here, not in `step`: with LongRoPE all tokens may have to be computed again
            new = self._entering
        self._entering = []
        if not self._sequence.prefill(new, lambda: self._cancelled):
            return None
        token = self._sequence.step(self._choose)
        if self._grammar is not None and token not in self._stop_ids:
            self._grammar.take(token)
        if self._first is None:
            self._first = self._elapsed + perf_counter() - started
            self._before_first = len(self._ids)
        return [token]

    def _end(self, finish: Finish, seconds: float, *, sound: bool = True) -> None:
        self._elapsed += seconds
        if not self._closed:
            text, stopped = self._stops.push(self._text.finish())
            self._pieces.append(text if stopped else text + self._stops.finish())
        count = len(self._ids)
        guessed, accepted = self._sequence.guesses if self._sequence is not None else (0, 0)
        if self._first is None and count:
            self._first, self._before_first = self._elapsed, count  # nothing had to be computed
        decode_s, decoded = self._elapsed - (self._first or 0.0), count - self._before_first - 1
        whole = "".join(self._pieces)
        parsed, invalid = self._read(whole, finish)
        self._answer = Answer(
            text=whole,
            prompt_tokens=len(self._prompt.tokens),
            reused_tokens=self._reused,
            recomputed_tokens=self._sequence.recomputed if self._sequence is not None else 0,
            new_tokens=count,
            token_ids=tuple(self._ids),
            finish=finish,
            time_to_first_token_s=self._first,
            decode_tokens_per_s=decoded / decode_s if decoded > 0 and decode_s > 0 else None,
            total_s=self._elapsed,
            provider=self._provider,
            prefill_provider=self._prefill_provider,
            logprobs=tuple(self._choose.logprobs),
            guessed_tokens=guessed,
            accepted_tokens=accepted,
            rejected=self._rejected,
            parsed=parsed,
            tool_calls=self._calls(whole, finish),
            invalid=invalid,
        )
        self._sequence = None
        self._on_end(self._answer, sound)

    def _calls(self, text: str, finish: Finish) -> tuple[ToolCall, ...]:
        """`Answer.tool_calls`; none where one of the stop texts cut a call in two, which would lack arguments."""
        cut = self._grammar is not None and not self._grammar.complete
        return self._read_calls(text) if self._read_calls and finish == "stop" and not cut else ()

    def _read(self, text: str, finish: Finish) -> tuple[object, str | None]:
        """`Answer.parsed` and `Answer.invalid`."""
        grammar = self._grammar
        if grammar is None or finish != "stop" or self._closed or not grammar.complete:
            return None, None
        try:
            return grammar.read(text), None
        except ValueError as problem:
            return None, why_invalid(problem)
        except RecursionError:
            return None, "it is nested too deeply to be read"


def answer_once(
    model: Model,
    encode: Callable[[], list[int]],
    sampling: Sampling,
    rules: Rules | None = None,
    adapter: Adapter | None = None,
) -> Stream:
    """An answer whose KV cache goes with it; errors as `Model.prepare`."""
    sequences: list[KvSequence] = []

    def fresh(prompt: Prompt) -> KvSequence:
        tokens = len(prompt.tokens) + prompt.max_new_tokens
        sequences.append(model.answering_sequence(tokens, prompt.tokens, adapter))
        return sequences[0]

    def free(answer: Answer | None, sound: bool) -> None:
        for sequence in sequences:
            sequence.close()

    return model.stream(model.prepare(encode, sampling), sampling, fresh, free, rules)
