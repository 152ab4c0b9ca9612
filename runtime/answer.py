"""An answer while it is written, and when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.sampling import Sampling, chooser
from edgephi.runtime.tokenizer import Tokenizer

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Answer:
    """What was generated, and how fast.

    Times are monotonic seconds spent inside the stream; what the caller does between two pieces is not counted.
    """

    text: str
    """Without special tokens."""
    prompt_tokens: int
    reused_tokens: int
    """Of the prompt, taken from the KV cache instead of computed."""
    recomputed_tokens: int
    """Computed again although they were in the KV cache: the sequence crossed the length at which the model changes its
    rotary factors (LongRoPE), or lost its place to another caller while nobody asked for its next token."""
    new_tokens: int
    """Generated."""
    token_ids: tuple[int, ...]
    """Generated, the stop token included."""
    finish: Finish
    time_to_first_token_s: float | None
    """From the start of the iteration, templating and tokenizing added; None when cancelled before."""
    decode_tokens_per_s: float | None
    """Tokens after the first over the time they took; None below two tokens."""
    total_s: float
    provider: str = "cpu"
    """Short name of the execution provider that computed its tokens."""
    prefill_provider: str = "cpu"
    """Of the one that computed the prompt."""
    guessed_tokens: int = 0
    """Of the answer, taken from the text before it and verified several in one run (prompt lookup)."""
    accepted_tokens: int = 0
    """Of those, the ones that the model would have chosen itself."""
    rejected: tuple[str, ...] = ()
    """Providers that should have, and why they did not; empty unless the model was loaded with a fallback."""


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt, checked against the context."""

    tokens: Sequence[int]
    max_new_tokens: int
    """Bounded by what the context leaves."""
    prepare_s: float
    """Time templating and tokenizing took."""


class Stream(Iterator[str]):
    """Pieces of text, whole characters each; computing happens while it is iterated.

    Args:
        prompt: what to answer.
        open_sequence: gives the sequence to use, whatever its cache holds.
        on_end: called with the answer (None: the runtime failed) and whether the sequence may be used again; once, or
            again where Ctrl-C struck in it.
        provider, prefill_provider, rejected: for the answer's statistics.

    Raises (on iteration):
        EngineError: the model was closed, or the runtime failed.
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
    ) -> None:
        self._prompt = prompt
        self._choose = chooser(sampling)
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
        self._cancelled = False
        self._elapsed = prompt.prepare_s
        self._first: float | None = None
        self._answer: Answer | None = None
        self._failure: Exception | None = None

    def __next__(self) -> str:
        while self._answer is None:
            if self._failure:
                raise self._failure
            if piece := self._advance():
                return piece
        raise StopIteration

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

    def _advance(self) -> str:
        """One token further; the text it completes."""
        started = perf_counter()
        written = len(self._pieces)
        try:
            self._take(self._compute(), perf_counter() - started)
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

    def _take(self, token: int | None, seconds: float) -> None:
        """Enter what `_compute` gave, and how long it took."""
        if token is None:
            self._end("cancelled", seconds)
        else:
            self._ids.append(token)
            if self._first is None:
                self._first = self._elapsed + seconds
            if token in self._stop_ids:
                self._end("stop", seconds)
            else:
                self._pieces.append(self._text.push(token))
                if len(self._ids) == self._prompt.max_new_tokens:
                    self._end("length", seconds)
                else:
                    self._elapsed += seconds

    def _compute(self) -> int | None:
        """The next token, or None when cancelled first."""
        if self._cancelled:
            return None
        if self._sequence is None:
            self._sequence = self._open_sequence(self._prompt)
            if self._cancelled:  # before there was a sequence to interrupt
                return None
            self._reused = self._sequence.reuse(self._prompt.tokens)
            if not self._sequence.prefill(self._prompt.tokens[self._reused :], lambda: self._cancelled):
                return None
        # enters the last token here, not in `step`: with LongRoPE all tokens may have to be computed again
        elif not self._sequence.prefill((), lambda: self._cancelled):
            return None
        return self._sequence.step(self._choose)

    def _end(self, finish: Finish, seconds: float, *, sound: bool = True) -> None:
        self._elapsed += seconds
        self._pieces.append(self._text.finish())
        count = len(self._ids)
        guessed, accepted = self._sequence.guesses if self._sequence is not None else (0, 0)
        decode_s = self._elapsed - (self._first or 0.0)
        self._answer = Answer(
            text="".join(self._pieces),
            prompt_tokens=len(self._prompt.tokens),
            reused_tokens=self._reused,
            recomputed_tokens=self._sequence.recomputed if self._sequence is not None else 0,
            new_tokens=count,
            token_ids=tuple(self._ids),
            finish=finish,
            time_to_first_token_s=self._first,
            decode_tokens_per_s=(count - 1) / decode_s if count > 1 and decode_s > 0 else None,
            total_s=self._elapsed,
            provider=self._provider,
            prefill_provider=self._prefill_provider,
            guessed_tokens=guessed,
            accepted_tokens=accepted,
            rejected=self._rejected,
        )
        self._sequence = None
        self._on_end(self._answer, sound)
