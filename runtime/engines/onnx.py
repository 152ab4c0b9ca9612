"""The engine for the CPU: plain onnxruntime, with a KV cache of its own.

Sequences fork, go back, are written to files, share the prefixes they begin with, and take their decode steps together.
A sequence that computes has a slot in a pool of caches; how many slots there are is how many sequences can decode in
one run. When a sequence ends, its slot keeps what it holds until another needs it, and then the prefix cache does. A
sequence that is not being asked may lose its slot in the same way, and what is not found again is computed again.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import GraphEntry
from edgephi.devices.memory import return_freed_memory
from edgephi.errors import EngineError, PromptError
from edgephi.runtime.engines.base import Abilities, OpenRequest, common_prefix, require_in_vocabulary
from edgephi.runtime.engines.onnx_graph import DecoderGraph
from edgephi.runtime.engines.onnx_slots import Slots
from edgephi.runtime.engines.saved_cache import ROWS, CacheTensor, cache_key, read_cache, read_fact, write_cache
from edgephi.runtime.placement import Placement
from edgephi.runtime.prefix_cache import PrefixStatistics, Rows
from edgephi.runtime.prepacked import GRAPH
from edgephi.runtime.sampling import Chooser
from edgephi.runtime.scheduler import Scheduler

if TYPE_CHECKING:
    from onnxruntime import RunOptions

PREFILL_CHUNK = 256
"""Tokens of a prompt that are computed at once; another caller waits for no more than these. Activations grow with
them: 241 MB for 1,024 tokens of SmolLM2 at once, 69 MB in these pieces; 512 and 1,024 took from 11 % less to 11 % more
processor time."""

KV = "keys_and_values"
"""The tensor of a saved cache, [2 * layers, kv_heads, tokens, head_dim]."""
ABILITIES = Abilities(rewind=True, fork=True, save=True, batch=True, share=True)


class OnnxEngine:
    """A graph, its KV caches and the prefixes it remembers. Any number of threads may use its sequences.

    Args:
        context_length: no sequence is longer.
        rope_switch: longest sequence that takes the short rope, in a model with two.
        max_parallel: sequences that decode in one run; more can be open.
        prefix_bytes: of keys and values that are kept for prompts to come.
        key: of saved caches, without their rope; see `cache_key`.
    """

    abilities = ABILITIES
    placements: tuple[Placement, ...] = ()
    """The CPU is the only provider there is; `runtime/placement.py` asks a twin when somebody wants to know."""

    def __init__(
        self,
        graph: DecoderGraph,
        *,
        context_length: int,
        rope_switch: int | None,
        max_parallel: int,
        prefix_bytes: int,
        key: Mapping[str, str],
    ) -> None:
        self._key = dict(key)
        self._tensors = {KV: CacheTensor(graph.kv_type, (2 * graph.layers, graph.kv_heads, ROWS, graph.head_dim))}
        self._graph: DecoderGraph | None = graph
        self.vocabulary, self.rope_switch = graph.vocabulary, rope_switch
        self.slots = Slots(
            graph,
            most=max_parallel,
            context_length=context_length,
            rope_switch=rope_switch,
            prefix_bytes=prefix_bytes,
        )
        self.scheduler: Scheduler[OnnxSequence, NDArray[np.float32]] = Scheduler(self.slots.step, max_parallel)
        self._line: deque[object] = deque()
        self._freed = threading.Condition()
        self._sequences: weakref.WeakSet[OnnxSequence] = weakref.WeakSet()

    @property
    def prefix_statistics(self) -> PrefixStatistics:
        """What was found of prompts, and what is kept."""
        return self.slots.statistics

    def require_open(self) -> None:
        """Raises EngineError once the engine is closed."""
        if self._graph is None:
            raise EngineError("this model is closed", remedy="Load the bundle again with `edgephi.load`")

    def sequence(self, capacity: int, *, scope: str | None = None) -> OnnxSequence:
        """An empty sequence for `capacity` tokens. Its cache is taken when it is needed.

        Args:
            scope: `reuse` finds what sequences of the same scope left. None: nothing is found, and nothing is left.

        Raises:
            EngineError: the engine is closed.
        """
        self.require_open()
        sequence = OnnxSequence(self, capacity, scope)
        self._sequences.add(sequence)
        return sequence

    def restore(self, file: Path, capacity: int, *, scope: str | None = None) -> OnnxSequence:
        """The sequence that `OnnxSequence.save` wrote; see `Engine.restore`.

        Args:
            scope: of the sequence.
        """
        rope = "one" if self.rope_switch is None else "long" if read_fact(file, "rope") == "long" else "short"
        saved = read_cache(file, self.key(rope), self._tensors, capacity=capacity, vocabulary=self.vocabulary)
        sequence = self.sequence(capacity, scope=scope)
        sequence.hold(saved.tokens, saved.tensors[KV], is_long=rope == "long")
        return sequence

    def key(self, rope: str) -> dict[str, str]:
        """Of a saved cache with keys of this rope: `short` or `long`, or the model's `one`."""
        return {**self._key, "rope": rope}

    def close(self) -> None:
        """Free the sequences, then the weights, and return the memory to the system; more than once is allowed."""
        for sequence in list(self._sequences):
            sequence.close()
        if self._graph is not None:
            self.scheduler.alone(self._free)

    def _free(self) -> None:
        graph, self._graph = self._graph, None
        self.slots.free()
        if graph is not None:
            graph.close()
        return_freed_memory()

    def wait_for_slot(self, place: Callable[[], bool], cancelled: Callable[[], bool]) -> bool:
        """Call `place` inside the scheduler until it succeeds, behind those that came before; False: cancelled."""
        if not self._line and self.scheduler.alone(place):
            return True
        ticket = object()
        with self._freed:
            self._line.append(ticket)
        try:
            while not cancelled():
                if self._line[0] is ticket and self.scheduler.alone(place):
                    return True
                with self._freed:
                    self._freed.wait(0.05)
            return False
        finally:
            with self._freed:
                self._line.remove(ticket)
                self._freed.notify_all()

    def released(self) -> None:
        """Somebody is done with a slot."""
        with self._freed:
            self._freed.notify_all()


def graph_file(graph: GraphEntry) -> str:
    """The graph that this engine runs."""
    return graph.logit_rows or graph.last_row or graph.file


def open_engine(request: OpenRequest) -> OnnxEngine:
    """Load a bundle's CPU graph; see `EngineModule.open_engine`."""
    entry, manifest = request.place.choice.graph, request.manifest
    assert entry is not None, "the NPU's graphs are another engine's"
    name = graph_file(entry)
    graph, expected = request.folder / name, request.hashes[name]
    if request.prepacked is not None:
        graph, expected = request.prepacked / GRAPH, None  # runtime/prepacked.py compares it with its own record
    opened = DecoderGraph(
        graph,
        expected,
        threads=request.threads,
        spinning=request.place.choice.spinning.on,
        packed=request.prepacked is not None,
    )
    return OnnxEngine(
        opened,
        context_length=request.config.context_length,
        rope_switch=manifest.model.rope_switch,
        max_parallel=request.max_parallel,
        prefix_bytes=request.prefix_bytes,
        key=cache_key(manifest, "onnx", kv_type=opened.kv_type.name),
    )


class OnnxSequence:
    """One sequence (the `KvSequence` protocol). Made by `OnnxEngine.sequence`; one thread at a time may use it.

    Attributes:
        busy: a thread is inside one of its calls, so that it keeps its slot.
        thread: the one that was last.
        slot: where its cache is; -1: nowhere.
        entering: the token a step computes, and how many come before it.
    """

    def __init__(self, engine: OnnxEngine, capacity: int, scope: str | None) -> None:
        self._engine: OnnxEngine | None = engine
        self._scope = scope
        self.capacity = capacity
        self.busy, self.thread, self.slot = False, 0, -1
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

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def recomputed(self) -> int:
        return self._recomputed

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
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
            if self._long(length) != self._is_long:
                # the rope of one sequence cannot change
                self._recomputed += len(self._tokens)
                new = [*self._tokens, *new]
                self._forget(is_long=not self._is_long)
            done = self._compute(new, lambda: cancelled() or self._interrupted)
            self._interrupted = False
            return done

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
        self._pending = self._logits = None
        del self._tokens[length:]

    def reuse(self, prompt: Sequence[int]) -> int:
        with self._call() as engine:
            self._interrupted = False
            self._pending = self._logits = None
            wanted = list(prompt[:-1])  # the last token is always computed: its logits choose what follows
            is_long = self._long(len(prompt))
            shared = common_prefix(self._tokens, wanted)
            crossed = shared if is_long != self._is_long else 0
            held = self._held[:, :, :shared] if self._held is not None and not crossed else None
            placed = engine.wait_for_slot(
                lambda: engine.slots.place(self, wanted, (is_long, self._scope), held), lambda: self._interrupted
            )
            if not placed:
                self._forget(is_long=is_long)
            self._recomputed = max(0, crossed - len(self._tokens))
            engine.slots.count(len(prompt), len(self._tokens))
            return len(self._tokens)

    def fork(self) -> OnnxSequence:
        with self._call() as engine:
            other = engine.sequence(self.capacity, scope=self._scope)
            other._held, other._tokens, other._is_long = self._rows(engine), list(self._tokens), self._is_long
            other._pending, other._logits, other._recomputed = self._pending, self._logits, self._recomputed
            return other

    def save(self, file: Path) -> None:
        with self._call() as engine:
            rows = self._rows(engine)
            if rows is None:
                raise EngineError("an empty sequence is not saved", remedy="Give it a prompt first")
            rope = "one" if engine.rope_switch is None else "long" if self._is_long else "short"
            write_cache(file, engine.key(rope), self._tokens, {KV: rows})

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
            unpin = engine.scheduler.alone(lambda: slots.pin(slot))

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
        self.slot, self._tokens, self._is_long, self._held = slot, tokens, is_long, None

    def lose_slot(self) -> None:
        """Called by the engine: the cache is gone until the next call."""
        self.slot = -1

    def _compute(self, new: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        """Have everything in the cache, these tokens at its end; False: cancelled before."""
        engine = self._opened()
        if self.slot < 0:
            known, kind, held = self._tokens, (self._is_long, self._scope), self._held
            if not engine.wait_for_slot(lambda: engine.slots.place(self, known, kind, held), cancelled):
                return False
            lost = known[len(self._tokens) :]
            self._recomputed += len(lost)
            new = [*lost, *new]
        for start in range(0, len(new), PREFILL_CHUNK):
            if cancelled():
                return False
            part, self._pending = list(new[start : start + PREFILL_CHUNK]), None
            if len(part) == 1 and self._tokens:
                self.entering = part[0], len(self._tokens)
                self._logits = engine.scheduler.step(self)
            elif not self._compute_part(engine, part):
                return False
        return True

    def _compute_part(self, engine: OnnxEngine, part: list[int]) -> bool:
        import onnxruntime

        slot, start = self.slot, len(self._tokens)
        options = self._running = onnxruntime.RunOptions()
        try:
            self._logits = engine.scheduler.alone(lambda: engine.slots.prefill(slot, part, start, options))
        except EngineError:
            if self._interrupted and self._engine is not None:
                return False
            raise
        finally:
            self._running = None
        return True

    def _rows(self, engine: OnnxEngine) -> Rows | None:
        """A copy of the cache."""
        if self.slot < 0 and self._held is not None:
            return self._held[:, :, : len(self._tokens)]
        if not self._tokens:
            return None
        self._compute((), lambda: False)
        slots, slot, length = engine.slots, self.slot, len(self._tokens)
        return engine.scheduler.alone(lambda: slots.read(slot, length))

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
        with engine.slots.lock:
            self.busy, self.thread = True, threading.get_ident()
        try:
            yield engine
        finally:
            self.busy = False
            engine.released()

    def _opened(self) -> OnnxEngine:
        if self._engine is None:
            raise EngineError("this answer's model was closed", remedy="Load the bundle again with `edgephi.load`")
        return self._engine
