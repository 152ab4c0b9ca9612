"""A sequence on the NPU: its KV cache, which the graphs read and write in place, and what can be done with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import EngineError, PromptError
from edgephi.runtime.engines.base import cannot, common_prefix, require_in_vocabulary
from edgephi.runtime.engines.saved_cache import ROWS, CacheTensor, SavedCache, write_cache
from edgephi.runtime.sampling import Chooser


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


class NpuSequence:
    """One sequence and its KV cache (the `KvSequence` protocol). Made by `NpuEngine.sequence`.

    A prompt is computed in chunks of a fixed number of tokens, the last one padded. What padding leaves in the cache
    lies behind the sequence, where nothing looks, until the next tokens overwrite it; that is also how a rewind works.

    Args:
        whole_chunks: a piece of the prompt of one token is padded too, because tokens are another provider's.
        key: what a saved cache depends on.
        family: the engine's open sequences; this one and its forks join them.
    """

    def __init__(
        self,
        run: Run,
        logits: Callable[[NDArray[np.float16]], NDArray[np.float32]],
        cache: KvCache,
        chunk: int,
        capacity: int,
        vocabulary: int,
        *,
        whole_chunks: bool = False,
        key: Mapping[str, str] | None = None,
        family: weakref.WeakSet[NpuSequence] | None = None,
    ) -> None:
        self._run, self._logits = run, logits
        self._cache: KvCache | None = cache
        self._chunk, self._vocabulary, self._whole_chunks = chunk, vocabulary, whole_chunks
        self._key = dict(key or {})
        self._family = weakref.WeakSet() if family is None else family
        self._family.add(self)
        self._hidden: NDArray[np.float16] | None = None
        self._pending: int | None = None
        self._tokens: list[int] = []
        self.capacity = capacity

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def recomputed(self) -> int:
        return 0

    @property
    def cache(self) -> KvCache:
        """Rows beyond `tokens` mean nothing."""
        return self._opened()

    @property
    def guesses(self) -> tuple[int, int]:
        return 0, 0

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        require_in_vocabulary(tokens, self._vocabulary)
        new = [*(() if self._pending is None else (self._pending,)), *tokens]
        if len(self._tokens) + len(new) > self.capacity:
            raise PromptError(
                f"a sequence of {len(self._tokens) + len(new):,} tokens exceeds its {self.capacity:,}",
                remedy="Shorten the prompt or ask for fewer tokens",
            )
        for start in range(0, len(new), self._chunk):
            if cancelled():
                return False
            self._append(new[start : start + self._chunk], padded=self._whole_chunks and bool(tokens))
        return True

    def step(self, choose: Chooser) -> int:
        if self._pending is not None:
            self.prefill((), lambda: False)
        self._opened()
        if self._hidden is None:
            raise EngineError("there is nothing to continue", remedy="Give the sequence a prompt first")
        self._pending = choose(self._logits(self._hidden))
        return self._pending

    def rewind(self, length: int) -> None:
        self._opened()
        self._pending = self._hidden = None
        del self._tokens[length:]

    def reuse(self, prompt: Sequence[int]) -> int:
        # the last token is always computed: its logits choose what follows
        self.rewind(min(common_prefix(self._tokens, prompt), len(prompt) - 1))
        return len(self._tokens)

    def fork(self) -> NpuSequence:
        with memory_for_cache(self._opened().arrays[0][0].shape[2], len(self._opened().arrays)):
            cache = self._opened().copy(len(self._tokens))
        forked = NpuSequence(
            self._run,
            self._logits,
            cache,
            self._chunk,
            self.capacity,
            self._vocabulary,
            whole_chunks=self._whole_chunks,
            key=self._key,
            family=self._family,
        )
        forked._tokens, forked._hidden, forked._pending = [*self._tokens], self._hidden, self._pending
        return forked

    def save(self, file: Path) -> None:
        cache = self._opened()
        if not self._tokens:
            raise EngineError("there is nothing to save", where=file, remedy="Give the sequence a prompt first")
        write_cache(file, self._key, self._tokens, cache.rows(len(self._tokens)))

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
        self._tokens = []

    def _append(self, tokens: list[int], *, padded: bool) -> None:
        padding = [0] * (self._chunk - len(tokens)) if len(tokens) > 1 or padded else []
        hidden = self._run([*tokens, *padding], len(self._tokens), self._opened())
        self._hidden = np.ascontiguousarray(hidden[:, len(tokens) - 1 : len(tokens)])
        self._pending = None
        self._tokens += tokens

    def _opened(self) -> KvCache:
        if self._cache is None:
            raise EngineError("this answer's model was closed", remedy="Load the bundle again with `edgephi.load`")
        return self._cache


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
