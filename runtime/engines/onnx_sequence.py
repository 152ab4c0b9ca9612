"""One sequence of the CPU's engine: its tokens, where its cache is, and how it is computed further."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import EngineError, PromptError
from edgephi.runtime.engines.base import common_prefix, require_in_vocabulary
from edgephi.runtime.engines.saved_cache import write_cache
from edgephi.runtime.prefix_cache import Rows
from edgephi.runtime.sampling import Chooser
from edgephi.runtime.speculation import Guesses

if TYPE_CHECKING:
    from onnxruntime import RunOptions

    from edgephi.runtime.adapters import Adapter
    from edgephi.runtime.engines.onnx import OnnxEngine
    from edgephi.runtime.engines.onnx_slots import Scope

PREFILL_CHUNK = 256
"""Tokens of a prompt that are computed at once; another caller waits for no more than these. Activations grow with
them: 241 MB for 1,024 tokens of SmolLM2 at once, 69 MB in these pieces; 512 and 1,024 took from 11 % less to 11 % more
processor time."""
ROW_BLOCK = 128
"""onnxruntime's attention takes so many rows together, and adds up in another order where one is left alone. Pieces of
a prompt leave none, so that a token's keys and logits are the same bits wherever a prompt was divided."""
KV = "keys_and_values"
"""The tensor of a saved cache, [2 * layers, kv_heads, tokens, head_dim]."""


class OnnxSequence:
    """One sequence (the `KvSequence` protocol). Made by `OnnxEngine.sequence`; one thread at a time may use it.

    Attributes:
        busy: a thread is inside one of its calls, so that it keeps its slot.
        yields: that thread waits in line, and whoever is before it may take the slot.
        thread: the one that was last.
        slot: where its cache is; -1: nowhere.
        entering: the token a step computes, and how many come before it.
        adapter: what it is computed with.
    """

    def __init__(
        self,
        engine: OnnxEngine,
        capacity: int,
        scope: str | None,
        *,
        speculate: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        self._engine: OnnxEngine | None = engine
        self._scope, self.adapter = scope, adapter
        self._shared_with: Scope = scope if adapter is None or scope is None else (scope, adapter.sha256)
        self.capacity = capacity
        self.busy, self.yields, self.thread, self.slot = False, False, 0, -1
        self.entering = (0, 0)
        self._tokens: list[int] = []
        """In the cache where there is a slot, else those that are to be there again."""
        self._held: Rows | None = None
        """Rows of these tokens, of a fork or a file, until there is a slot."""
        self._is_long = False
        self._pending: int | None = None
        self._logits: NDArray[np.float32] | None = None
        self._recomputed = 0
        self._interrupted = False
        self._running: RunOptions | None = None
        self._guesses: Guesses[NDArray[np.float32]] = Guesses(
            (lambda: engine.may_verify(adapter)) if speculate else None
        )

    @property
    def tokens(self) -> Sequence[int]:
        return self._guesses.asked_for(self._tokens)

    @property
    def recomputed(self) -> int:
        return self._recomputed

    @property
    def guesses(self) -> tuple[int, int]:
        """Tokens that were guessed since the last `reuse`, and those of them that were right."""
        return self._guesses.counts

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        while self._take_guess():
            if not tokens:
                return True
            self._pending, tokens = tokens[0], tokens[1:]
        with self._call() as engine:
            require_in_vocabulary(tokens, engine.vocabulary)
            new = [*(() if self._pending is None else (self._pending,)), *tokens]
            length = len(self._tokens) + len(new)
            if length > self.capacity:
                raise PromptError(
                    f"a sequence of {length:,} tokens exceeds its {self.capacity:,}",
                    remedy="Shorten the prompt or ask for fewer tokens",
                )
            if not new:
                return True
            self._pending, self._interrupted = None, False
            if self._long(length) != self._is_long:
                # the rope of one sequence cannot change
                self._recomputed += len(self._tokens)
                new = [*self._tokens, *new]
                self._forget(is_long=not self._is_long)
            return self._compute(new, lambda: cancelled() or self._interrupted)

    def step(self, choose: Chooser) -> int:
        if self._pending is not None:
            self.prefill((), lambda: False)
        self._opened()
        if self._logits is None:
            raise EngineError("there is nothing to continue", remedy="Give the sequence a prompt first")
        self._pending = choose(self._logits)
        return self._pending

    def rewind(self, length: int) -> None:
        self._opened()
        self._guesses.drop(self._tokens)
        self._pending = self._logits = None
        del self._tokens[length:]

    def reuse(self, prompt: Sequence[int]) -> int:
        with self._call() as engine:
            self._pending = self._logits = None
            self._guesses = self._guesses.anew()
            # the last token is always computed: its logits choose what follows. Not alone, as at first (ROW_BLOCK)
            wanted = list(prompt[:-2])
            is_long = self._long(len(prompt))
            shared = common_prefix(self._tokens, wanted)
            crossed = shared if is_long != self._is_long else 0
            held = self._held[:, :, :shared] if self._held is not None and not crossed else None
            placed = engine.wait_for_slot(
                self,
                lambda: engine.slots.place(self, wanted, (is_long, self._shared_with), held),
                lambda: self._interrupted,
            )
            self._interrupted = False
            if not placed:
                self._forget(is_long=is_long)
            self._recomputed = max(0, crossed - len(self._tokens))
            engine.slots.count(len(prompt), len(self._tokens))
            return len(self._tokens)

    def fork(self, *, speculate: bool = False) -> OnnxSequence:
        with self._call() as engine:
            other = engine.sequence(self.capacity, scope=self._scope, speculate=speculate, adapter=self.adapter)
            other._held, other._tokens, other._is_long = self._rows(engine), list(self._tokens), self._is_long
            other._pending, other._recomputed = self._pending, self._recomputed
            # a copy: whoever chooses may write into what it is given
            other._logits = None if self._logits is None else self._logits.copy()
            return other

    def save(self, file: Path) -> None:
        with self._call() as engine:
            rows = self._rows(engine)
            if rows is None:
                raise EngineError("an empty sequence is not saved", remedy="Give it a prompt first")
            rope = "one" if engine.rope_switch is None else "long" if self._is_long else "short"
            write_cache(file, engine.key(rope, self.adapter), self._tokens, {KV: rows})

    def hold(self, tokens: list[int], rows: Rows, *, is_long: bool) -> None:
        """Called by the engine: the content of a new sequence."""
        self._tokens, self._held, self._is_long = tokens, rows, is_long

    def pin(self) -> Callable[[], None]:
        """Keep the sequence's cache as a prefix of others until the function that is returned is called.

        Raises:
            EngineError: the sequence is closed.
        """
        with self._call() as engine:
            self._compute((), lambda: False)
            slots, slot = engine.slots, self.slot
            unpin = engine.alone(lambda: slots.pin(slot))

        def release() -> None:
            engine.scheduler.alone(unpin)

        return release

    def interrupt(self) -> None:
        """Let a prefill end as if it were cancelled, within some 30 ms. Any thread may call it."""
        self._interrupted = True
        running = self._running
        if running is not None:
            running.terminate = True

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            self.interrupt()
            engine.slots.release(self)
            engine.scheduler.leave(self)
            engine.released()
        self.slot = -1
        self._held = self._pending = self._logits = None
        self._tokens = []

    def take_slot(self, slot: int, tokens: list[int], *, is_long: bool) -> None:
        """Called by the engine: the cache is there, and holds these tokens, the first of those that were wanted."""
        self.slot, self._tokens, self._is_long, self._held, self.yields = slot, tokens, is_long, None, False

    def lose_slot(self) -> None:
        """Called by the engine: the cache is gone until the next call."""
        self.slot = -1

    def _compute(self, new: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        """Have everything in the cache, these tokens at its end; False: cancelled before.

        Whatever keeps it from that, there is then nothing that `step` could take for the logits of the last token.
        """
        done = False
        try:
            done = self._compute_all(new, cancelled)
        finally:
            if not done:
                self._pending = self._logits = None
        return done

    def _compute_all(self, new: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        engine = self._opened()
        if self.slot < 0:
            known, kind, held = self._tokens, (self._is_long, self._shared_with), self._held
            if not engine.wait_for_slot(self, lambda: engine.slots.place(self, known, kind, held), cancelled):
                return False
            lost = known[len(self._tokens) :]
            self._recomputed += len(lost)
            new = [*lost, *new]
        start = 0
        for count in pieces(len(new)):
            part, start = list(new[start : start + count]), start + count
            if len(part) == 1 and self._tokens:
                if cancelled():
                    return False
                self._step_or_verify(engine, part[0])
            elif not self._compute_part(engine, part, cancelled):
                return False
        return True

    def _step_or_verify(self, engine: OnnxEngine, token: int) -> None:
        """Compute one token, and those that are guessed to follow where that pays."""
        start, guess = len(self._tokens), list[int]()
        if self._guesses.looks_ahead and not engine.scheduler.is_shared_with_others_than(self):
            most = self.capacity - start - 1
            if engine.rope_switch is not None and not self._is_long:
                most = min(most, engine.rope_switch - start - 1)
            guess = self._guesses.draft([*self._tokens, token], most)
        started = perf_counter()
        if not guess:
            self.entering = token, start
            self._logits = engine.scheduler.step(self)
            self._guesses.stepped(perf_counter() - started)
            return
        slots, slot = engine.slots, self.slot
        rows = engine.alone(lambda: slots.verify(slot, [token, *guess], start))
        self._logits = rows[0]
        self._guesses.verified(guess, list(rows[1:]), perf_counter() - started)

    def _take_guess(self) -> bool:
        """Whether the token that was chosen is the one that was guessed; its logits are there then."""
        logits = self._guesses.take(self._pending)
        if logits is None:
            return False
        self._opened()
        self._logits, self._pending = logits, None
        return True

    def _compute_part(self, engine: OnnxEngine, part: list[int], cancelled: Callable[[], bool]) -> bool:
        import onnxruntime

        slot, start = self.slot, len(self._tokens)
        while True:
            options = self._running = onnxruntime.RunOptions()
            try:
                if cancelled():  # asked here, because `interrupt` finds the options from now on
                    return False
                self._logits = engine.alone(lambda: engine.slots.prefill(slot, part, start, options))  # noqa: B023
                return True
            except EngineError:
                self._opened()
                # once more where nobody asked for the end of this: a fork, say, of a cache that was lost
                if not options.terminate:
                    raise
            finally:
                self._running = None

    def _rows(self, engine: OnnxEngine) -> Rows | None:
        """A copy of the cache."""
        if self.slot < 0 and self._held is not None:
            return self._held[:, :, : len(self._tokens)]
        if not self._tokens:
            return None
        self._compute((), lambda: False)
        slots, slot, length = engine.slots, self.slot, len(self._tokens)
        return engine.alone(lambda: slots.read(slot, length))

    def _forget(self, *, is_long: bool) -> None:
        """An empty cache."""
        engine = self._opened()
        engine.slots.release(self)
        self.slot, self._tokens, self._held, self._is_long = -1, [], None, is_long

    def _long(self, length: int) -> bool:
        switch = self._opened().rope_switch
        return switch is not None and length > switch

    @contextmanager
    def _call(self) -> Iterator[OnnxEngine]:
        engine = self._opened()
        engine.require_open()
        try:
            with engine.slots.lock:
                self.busy, self.thread = True, threading.get_ident()
            self._guesses.drop(self._tokens)
            yield engine
        finally:
            self.busy = False
            engine.released()

    def _opened(self) -> OnnxEngine:
        if self._engine is None:
            raise EngineError("this answer's model was closed", remedy="Load the bundle again with `edgephi.load`")
        return self._engine


def pieces(count: int) -> Iterator[int]:
    """Lengths of the pieces in which tokens of a prompt are computed: no row of one is alone in a block of attention,
    unless there is one token only."""
    while count:
        length = min(PREFILL_CHUNK, count)
        if count - length == 1 and length > 2:
            length -= 1
        if length > 2 and length % ROW_BLOCK == 1:
            length -= 2
        yield length
        count -= length
