"""The engine: a loaded graph and, per sequence, a KV cache. onnxruntime-genai ("og") runs both."""

from __future__ import annotations

import ctypes
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgephi.errors import EngineError, PromptError
from edgephi.runtime.sampling import Chooser

if TYPE_CHECKING:
    from edgephi.runtime.config import GenaiModel

# A prompt is computed in pieces: a graph that returns logits for every row needs rows × vocabulary × 4 bytes for them
# (SmolLM2, 2,048 tokens: 440 MB at once, 48 MB in these pieces, equally fast), and a cancel is heard between two.
PREFILL_CHUNK = 256

# og allocates the whole KV cache of a sequence at once.
CAPACITY_STEP = 256


class Engine(Protocol):
    """One sequence and its KV cache."""

    @property
    def capacity(self) -> int:
        """Tokens the cache holds."""

    @property
    def tokens(self) -> Sequence[int]:
        """Token ids in the cache."""

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        """Append tokens; False when `cancelled` became true before all were computed."""

    def step(self, choose: Chooser) -> int:
        """The next token. It enters the cache with the next step or prefill."""

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens of the cache and forget the rest."""

    def close(self) -> None:
        """Free the cache; more than once is allowed."""


def capacity_for(tokens: int, context_length: int) -> int:
    """Cache size for a sequence of `tokens`: rounded up, never beyond the context."""
    return min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, context_length)


class OgModel:
    """A graph and its weights in og; sequences share them.

    Args:
        folder: an onnxruntime-genai folder.
        graph: file name of the graph in it.
        threads: of one operator. og behaves like one thread unless told.

    Raises:
        EngineError: og refuses the folder.
    """

    def __init__(self, folder: Path, config: GenaiModel, *, threads: int) -> None:
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        self._vocabulary = config.vocab_size
        self._sequences: weakref.WeakSet[OgEngine] = weakref.WeakSet()
        with _og_errors(folder, "Check the bundle with `edgephi verify`"):
            settings = og.Config(str(folder))
            settings.clear_providers()
            settings.overlay(json.dumps(overlay))
            self._model: Any = og.Model(settings)

    def require_open(self) -> None:
        """Raises EngineError once the model is closed."""
        if self._model is None:
            raise EngineError("this model is closed", remedy="Load the bundle again with `edgephi.load`")

    def sequence(self, capacity: int) -> OgEngine:
        """An empty sequence whose KV cache holds `capacity` tokens.

        Raises:
            EngineError: the model is closed, or there is no memory for the cache.
        """
        import onnxruntime_genai as og

        self.require_open()
        with _og_errors(f"KV cache of {capacity:,} tokens", "Ask for fewer tokens, or close other programs"):
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=capacity, do_sample=False, num_beams=1)
            engine = OgEngine(og.Generator(self._model, params), capacity, self._vocabulary)
        self._sequences.add(engine)
        return engine

    def close(self) -> None:
        """Free the sequences, then the weights, and return the memory to the system."""
        for engine in list(self._sequences):
            engine.close()
        self._model = None
        _trim_heap()


class OgEngine:
    """One og generator (the `Engine` protocol). Made by `OgModel.sequence`."""

    def __init__(self, generator: Any, capacity: int, vocabulary: int) -> None:
        self._generator = generator
        self._vocabulary = vocabulary
        self._pending: int | None = None
        self._tokens: list[int] = []
        self.capacity = capacity

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        # og looks token ids up without a check
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            raise PromptError(
                f"a token id is outside the model's vocabulary of {self._vocabulary:,}",
                remedy="Check that the tokenizer belongs to this model",
            )
        for start in range(0, len(tokens), PREFILL_CHUNK):
            if cancelled():
                return False
            self._append(tokens[start : start + PREFILL_CHUNK])
        return True

    def step(self, choose: Chooser) -> int:
        if self._pending is not None:
            self._append(())
        with _og_errors("decode", "Load the model again"):
            logits = self._open().get_logits()
        self._pending = choose(logits[0, -1])
        return self._pending

    def rewind(self, length: int) -> None:
        self._pending = None
        with _og_errors("KV cache", "Load the model again"):
            self._open().rewind_to(length)
        del self._tokens[length:]

    def close(self) -> None:
        self._generator = None
        self._pending = None
        self._tokens = []

    def _append(self, tokens: Sequence[int]) -> None:
        new = [*(() if self._pending is None else (self._pending,)), *tokens]
        with _og_errors("prefill or decode", "Load the model again"):
            self._open().append_tokens(np.asarray(new, dtype=np.int32))
        self._pending = None
        self._tokens += new

    def _open(self) -> Any:
        if self._generator is None:
            raise EngineError("this answer's model was closed", remedy="Load the bundle again with `edgephi.load`")
        return self._generator


def _trim_heap() -> None:
    """glibc keeps freed blocks for the next malloc: after closing SmolLM2 (86 MB) it held 150 MB. Others give them back."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none and needs none
        if trim is not None:
            trim(0)


@contextmanager
def _og_errors(where: object, remedy: str) -> Iterator[None]:
    """og raises RuntimeError and MemoryError; say what it said, in edgephi's form."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:600] or type(error).__name__
        raise EngineError(f"onnxruntime-genai: {said}", where=where, remedy=remedy) from error
