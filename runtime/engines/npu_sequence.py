"""A sequence on the NPU: its KV cache, which the graphs read and write in place, and what can be done with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import EngineError, PromptError
from edgephi.runtime.engines.base import cannot, common_prefix, require_in_vocabulary
from edgephi.runtime.engines.saved_cache import ROWS, CacheTensor, SavedCache, write_cache
from edgephi.runtime.sampling import Chooser
from edgephi.runtime.speculation import Guesses, Lengths, repeats_exactly


class KvCache:
    """Keys and values of a sequence, [1, kv_heads, cache_rows, head_dim]; graphs read and write them in place.

    They are float16, or codes of 8 bits whose scales the graphs have.

    Attributes:
        arrays: (key, value) of every layer.
        values: the same memory as onnxruntime sees it.
    """

    def __init__(self, layers: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        import onnxruntime

        self.arrays = [(np.zeros(shape, dtype), np.zeros(shape, dtype)) for _ in range(layers)]
        wrap = onnxruntime.OrtValue.ortvalue_from_numpy
        self.values = [(wrap(key), wrap(value)) for key, value in self.arrays]

    def rows(self, length: int) -> dict[str, NDArray[Any]]:
        """Keys and values of the first `length` tokens, by name: views."""
        return {
            f"{part}.{layer}": array[:, :, :length]
            for layer, pair in enumerate(self.arrays)
            for part, array in zip(("key", "value"), pair, strict=True)
        }

    def write(self, rows: Mapping[str, NDArray[Any]], length: int) -> None:
        """Take over the first `length` tokens' from another cache or a file."""
        for name, array in self.rows(length).items():
            array[...] = rows[name]

    def tensors(self) -> dict[str, CacheTensor]:
        """What a file of a cache of this model holds."""
        return {
            name: CacheTensor(array.dtype, (*array.shape[:2], ROWS, array.shape[3]))
            for name, array in self.rows(0).items()
        }

    def copy(self, length: int) -> KvCache:
        """A cache of the same size with the first `length` tokens'; memory behind them is not touched."""
        first = self.arrays[0][0]
        copied = KvCache(len(self.arrays), first.shape, first.dtype)
        copied.write(self.rows(length), length)
        return copied


Run = Callable[[Sequence[int], int, KvCache], NDArray[np.float16]]
VERIFIED = 5
"""Tokens whose hidden states are compared between the two graphs."""


@dataclass(frozen=True)
class NpuGraphs:
    """What the sequences of a model have in common.

    Attributes:
        run: hidden states [1, n, hidden] of n tokens behind so many others: of one token, or of a chunk.
        logits: [vocabulary] of hidden states [1, 1, hidden].
        chunk: tokens that the prompt's graph computes at once.
        whole_chunks: a piece of the prompt of one token is padded too, because tokens are another provider's.
        may_verify: whether guessed tokens may be verified in the prompt's graph; asked when there is a guess.
        key: what a saved cache depends on.
        family: the open sequences.
    """

    run: Run
    logits: Callable[[NDArray[np.float16]], NDArray[np.float32]]
    chunk: int
    vocabulary: int
    whole_chunks: bool = False
    may_verify: Callable[[], bool] = lambda: False
    key: Mapping[str, str] = field(default_factory=dict)
    family: weakref.WeakSet[NpuSequence] = field(default_factory=weakref.WeakSet)


class NpuSequence:
    """One sequence and its KV cache (the `KvSequence` protocol). Made by `NpuEngine.sequence`.

    A prompt is computed in chunks of a fixed number of tokens, the last one padded. What padding leaves in the cache
    lies behind the sequence, where nothing looks, until the next tokens overwrite it; that is also how a rewind works,
    and what becomes of guessed tokens that were wrong. Guesses take the place of the padding behind a token: they cost
    a run of the prompt's graph instead of the token's, and the head, which is computed when somebody asks, nothing.
    """

    def __init__(self, graphs: NpuGraphs, cache: KvCache, capacity: int, *, speculate: bool = False) -> None:
        self._graphs = graphs
        self._cache: KvCache | None = cache
        self._hidden: NDArray[np.float16] | None = None
        self._pending: int | None = None
        self._tokens: list[int] = []
        may_verify = graphs.may_verify if speculate else None
        self._guesses: Guesses[NDArray[np.float16]] = Guesses(may_verify, Lengths.always(graphs.chunk - 1))
        self.capacity = capacity
        graphs.family.add(self)

    @property
    def tokens(self) -> Sequence[int]:
        return self._guesses.asked_for(self._tokens)

    @property
    def recomputed(self) -> int:
        return 0

    @property
    def cache(self) -> KvCache:
        """Rows beyond `tokens` mean nothing."""
        return self._opened()

    @property
    def guesses(self) -> tuple[int, int]:
        return self._guesses.counts

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        if not tokens and self._take_guess():
            return True
        self._guesses.drop(self._tokens)
        require_in_vocabulary(tokens, self._graphs.vocabulary)
        new = [*(() if self._pending is None else (self._pending,)), *tokens]
        if len(self._tokens) + len(new) > self.capacity:
            raise PromptError(
                f"a sequence of {len(self._tokens) + len(new):,} tokens exceeds its {self.capacity:,}",
                remedy="Shorten the prompt or ask for fewer tokens",
            )
        chunk = self._graphs.chunk
        for start in range(0, len(new), chunk):
            if cancelled():
                return False
            if tokens:
                self._append(new[start : start + chunk], padded=self._graphs.whole_chunks)
            else:
                self._step_or_verify(new[0])
        return True

    def step(self, choose: Chooser) -> int:
        if self._pending is not None:
            self.prefill((), lambda: False)
        self._opened()
        if self._hidden is None:
            raise EngineError("there is nothing to continue", remedy="Give the sequence a prompt first")
        self._pending = choose(self._graphs.logits(self._hidden))
        return self._pending

    def rewind(self, length: int) -> None:
        self._opened()
        self._guesses.drop(self._tokens)
        self._pending = self._hidden = None
        del self._tokens[length:]

    def reuse(self, prompt: Sequence[int]) -> int:
        # the last token is always computed: its logits choose what follows
        self.rewind(min(common_prefix(self.tokens, prompt), len(prompt) - 1))
        self._guesses = self._guesses.anew()
        return len(self._tokens)

    def fork(self, *, speculate: bool = False) -> NpuSequence:
        tokens = [*self.tokens]
        with memory_for_cache(self._opened().arrays[0][0].shape[2], len(self._opened().arrays)):
            cache = self._opened().copy(len(tokens))
        forked = NpuSequence(self._graphs, cache, self.capacity, speculate=speculate)
        forked._tokens, forked._hidden, forked._pending = tokens, self._hidden, self._pending
        return forked

    def save(self, file: Path) -> None:
        cache, tokens = self._opened(), self.tokens
        if not tokens:
            raise EngineError("there is nothing to save", where=file, remedy="Give the sequence a prompt first")
        write_cache(file, self._graphs.key, tokens, cache.rows(len(tokens)))

    def fill(self, saved: SavedCache) -> None:
        """Take over what a file held; the sequence is empty."""
        self._opened().write(saved.tensors, len(saved.tokens))
        self._tokens = [*saved.tokens]

    def pin(self) -> Callable[[], None]:
        raise cannot("the NPU's engine", "share")

    def interrupt(self) -> None:
        """A cancel is heard between two pieces of a prompt."""

    def close(self) -> None:
        self._cache = self._hidden = self._pending = None
        self._tokens, self._guesses = [], Guesses(None)

    def _append(self, tokens: list[int], *, padded: bool) -> None:
        """Compute a piece of the prompt."""
        self._hidden = self._compute(tokens, rows=1, padded=padded)[0]

    def _step_or_verify(self, token: int) -> None:
        """Compute a token that was chosen, and those that are guessed to follow where that pays."""
        most = min(self._graphs.chunk, self.capacity - len(self._tokens)) - 1
        guess = self._guesses.draft([*self._tokens, token], most) if self._guesses.looks_ahead else []
        started = perf_counter()
        self._hidden, *ahead = self._compute([token, *guess], rows=1 + len(guess))
        seconds = perf_counter() - started
        if guess:
            self._guesses.verified(guess, ahead, seconds)
        else:
            self._guesses.stepped(seconds)

    def _take_guess(self) -> bool:
        """Whether the token that was chosen is the one that was guessed; its hidden states are there then."""
        hidden = self._guesses.take(self._pending)
        if hidden is None:
            return False
        self._hidden, self._pending = hidden, None
        return True

    def _compute(self, tokens: list[int], *, rows: int, padded: bool = False) -> list[NDArray[np.float16]]:
        """Hidden states [1, 1, hidden] of the last `rows` of these tokens, which are in the cache now."""
        length, graphs = len(tokens), self._graphs
        padding = [0] * (graphs.chunk - length) if length > 1 or padded else []
        hidden = graphs.run([*tokens, *padding], len(self._tokens), self._opened())
        self._pending = None
        self._tokens += tokens
        return [np.array(hidden[:, row : row + 1]) for row in range(length - rows, length)]

    def _opened(self) -> KvCache:
        if self._cache is None:
            raise EngineError("this answer's model was closed", remedy="Load the bundle again with `edgephi.load`")
        return self._cache


def verifies_exactly(run: Run, cache: KvCache, chunk: int, vocabulary: int) -> bool:
    """Whether the prompt's graph gives a token, bit for bit, the hidden states that the token's graph gives it.

    Args:
        run: as of `NpuGraphs`.
        cache: an empty one.
    """

    def compute(tokens: list[int], past: int) -> NDArray[np.generic]:
        padding = [0] * (chunk - len(tokens)) if len(tokens) > 1 else []
        return run([*tokens, *padding], past, cache)[0, : len(tokens)]

    # one run shows all its rows: those of later tokens have read what earlier ones wrote
    return repeats_exactly(compute, vocabulary, (VERIFIED,))


@contextmanager
def memory_for_cache(rows: int, layers: int) -> Iterator[None]:
    """Raises EngineError when the block finds no memory for a KV cache."""
    try:
        yield
    except (MemoryError, ValueError) as error:
        raise EngineError(
            f"there is no memory for a KV cache of {rows:,} tokens in {layers} layers",
            where="KV cache",
            remedy="Close other programs, or export the model again with a shorter context",
        ) from error
