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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import GraphEntry
from edgephi.devices.memory import return_freed_memory
from edgephi.errors import EngineError, PromptError
from edgephi.runtime.adapters import Adapter
from edgephi.runtime.engines.base import Abilities, Engine, OpenRequest, speculation_in_words
from edgephi.runtime.engines.onnx_graph import DecoderGraph, verifies_exactly
from edgephi.runtime.engines.onnx_sequence import KV, OnnxSequence
from edgephi.runtime.engines.onnx_slots import Slots
from edgephi.runtime.engines.saved_cache import ROWS, CacheTensor, cache_key, read_cache, read_fact
from edgephi.runtime.integers.cache import entry_digest
from edgephi.runtime.placement.nodes import Placement
from edgephi.runtime.prefix_cache import PrefixStatistics
from edgephi.runtime.prepacked.packing import GRAPH
from edgephi.runtime.scheduler import Scheduler, interrupt_behind

Made = TypeVar("Made")

ABILITIES = Abilities(rewind=True, fork=True, save=True, batch=True, share=True, adapt=True, integers=True)


class OnnxEngine:
    """A graph, its KV caches and the prefixes it remembers. Any number of threads may use its sequences.

    Args:
        context_length: no sequence is longer.
        rope_switch: longest sequence that takes the short rope, in a model with two.
        max_parallel: sequences that decode in one run; more can be open.
        prefix_bytes: of keys and values that are kept for prompts to come.
        speculation: whether guessed tokens are verified together; None: where that changes no answer.
        key: of saved caches, without their rope; see `cache_key`.
        prompts: the graph that computes prompts, over the same KV cache; None: `graph` does.
    """

    abilities = ABILITIES
    placements: tuple[Placement, ...] = ()
    """The CPU is the only provider there is; `runtime/placement/nodes.py` asks a twin when somebody wants to know."""

    def __init__(
        self,
        graph: DecoderGraph,
        *,
        context_length: int,
        rope_switch: int | None,
        max_parallel: int,
        prefix_bytes: int,
        key: Mapping[str, str],
        speculation: bool | None = None,
        prompts: DecoderGraph | None = None,
    ) -> None:
        self._key = dict(key)
        self._tensors = {KV: CacheTensor(graph.kv_type, (2 * graph.layers, graph.kv_heads, ROWS, graph.head_dim))}
        self._graph: DecoderGraph | None = graph
        self._prompts = prompts
        self.vocabulary, self.rope_switch = graph.vocabulary, rope_switch
        self._context_length = context_length
        self.slots = Slots(
            graph,
            most=max_parallel,
            context_length=context_length,
            rope_switch=rope_switch,
            prefix_bytes=prefix_bytes,
            prompts=prompts,
        )
        self.scheduler: Scheduler[OnnxSequence, NDArray[np.float32]] = Scheduler(self._step, max_parallel)
        self._speculation = speculation
        self._may_verify: bool | None = None if speculation is None else speculation and graph.picks_rows
        self._verifies_with: weakref.WeakKeyDictionary[Adapter, bool] = weakref.WeakKeyDictionary()
        self._line: deque[object] = deque()
        self._lock = threading.RLock()
        self._freed = threading.Condition(self._lock)
        self._sequences: weakref.WeakSet[OnnxSequence] = weakref.WeakSet()

    @property
    def prefix_statistics(self) -> PrefixStatistics:
        """What was found of prompts, and what is kept."""
        return self.slots.statistics

    def require_open(self) -> None:
        """Raises EngineError once the engine is closed."""
        if self._graph is None:
            raise EngineError("this model is closed", remedy="Load the bundle again with `edgephi.load`")

    def sequence(
        self, capacity: int, *, scope: str | None = None, speculate: bool = False, adapter: Adapter | None = None
    ) -> OnnxSequence:
        """An empty sequence for `capacity` tokens. Its cache is taken when it is needed.

        Args:
            scope: `reuse` finds what sequences of the same scope left. None: nothing is found, and nothing is left.
            speculate: guess tokens and verify them together, unless `speculation` says otherwise.
            adapter: one that was compared with the graph's inputs.

        Raises:
            EngineError: the engine is closed, or its graph takes no adapters.
            PromptError: the capacity is larger than the model's context.
        """
        self.require_open()
        if capacity > self._context_length:
            raise PromptError(
                f"a sequence of {capacity:,} tokens exceeds the model's context of {self._context_length:,}",
                remedy="Ask for fewer tokens",
            )
        if adapter is not None and self._graph is not None and not self._graph.adapter_inputs:
            raise EngineError("this bundle's graph takes no adapters", remedy="Export the model again with --lora RANK")
        speculate = speculate and self._speculation is not False
        sequence = OnnxSequence(self, capacity, scope, speculate=speculate, adapter=adapter)
        with self._lock:
            self._sequences.add(sequence)
        return sequence

    def restore(
        self, file: Path, capacity: int, *, scope: str | None = None, adapter: Adapter | None = None
    ) -> OnnxSequence:
        """The sequence that `OnnxSequence.save` wrote; see `Engine.restore`.

        Args:
            scope, adapter: of the sequence.
        """
        rope = "one" if self.rope_switch is None else "long" if read_fact(file, "rope") == "long" else "short"
        saved = read_cache(file, self.key(rope, adapter), self._tensors, capacity=capacity, vocabulary=self.vocabulary)
        sequence = self.sequence(capacity, scope=scope, adapter=adapter)
        sequence.hold(saved.tokens, saved.tensors[KV], is_long=rope == "long")
        return sequence

    def key(self, rope: str, adapter: Adapter | None) -> dict[str, str]:
        """Of a saved cache with keys of this rope: `short` or `long`, or the model's `one`."""
        adapted = {} if adapter is None else {"adapter": adapter.sha256}
        return {**self._key, "rope": rope, **adapted}

    def close(self) -> None:
        """Free the sequences, then the weights, and return the memory to the system; more than once is allowed."""
        with self._lock:
            sequences = list(self._sequences)
        for sequence in sequences:
            sequence.close()
        if self._graph is not None:
            self.scheduler.alone(self._free)

    def alone(self, work: Callable[[], Made]) -> Made:
        """Run a function inside of the scheduler; see `Scheduler.alone`.

        Raises:
            EngineError: the engine was closed before it was this function's turn.
        """

        def checked() -> Made:
            self.require_open()
            return work()

        return self.scheduler.alone(checked)

    def _step(self, sequences: Sequence[OnnxSequence]) -> list[NDArray[np.float32]]:
        self.require_open()
        return self.slots.step(sequences)

    def _free(self) -> None:
        graphs = self._graph, self._prompts
        self._graph = self._prompts = None
        self.slots.free()
        for graph in graphs:
            if graph is not None:
                graph.close()
        return_freed_memory()

    @property
    def speculation(self) -> str:
        """Whether tokens are guessed, and why, in words for a person."""
        return speculation_in_words(self._speculation, self._may_verify)

    def may_verify(self, adapter: Adapter | None = None) -> bool:
        """Whether guessed tokens are verified together: as asked, or where a run of several tokens computes bit for
        bit what runs of one do.

        That depends on the processor's kernels and nothing promises it, so it is measured when it is first asked, with
        every adapter for itself.
        """
        if self._may_verify is None:
            self._may_verify = self.measure_verification()
        if adapter is None or not self._may_verify or self._speculation:
            return self._may_verify
        if adapter not in self._verifies_with:
            self._verifies_with[adapter] = self.measure_verification(adapter)
        return self._verifies_with[adapter]

    def measure_verification(self, adapter: Adapter | None = None) -> bool:
        """Whether a run of several tokens computes bit for bit what runs of one do, on this machine."""
        graph = self._graph
        return graph is not None and graph.picks_rows and self.alone(lambda: verifies_exactly(graph, adapter))

    def wait_for_slot(self, sequence: OnnxSequence, place: Callable[[], bool], cancelled: Callable[[], bool]) -> bool:
        """Call `place` inside the scheduler until it succeeds, behind those that came before; False: cancelled.

        Args:
            sequence: it may have a slot, and gives it to whoever came before.
        """
        if not self._line and self.alone(place):
            return True
        ticket = object()
        try:
            with self._lock:
                self._line.append(ticket)
                sequence.yields = True
                self._freed.notify_all()
            while not cancelled():
                if self._line[0] is ticket and self.alone(place):
                    return True
                with self._lock:
                    self._freed.wait(0.05)
            return False
        except RuntimeError as error:
            raise interrupt_behind(error) from None
        finally:
            struck: BaseException | None = None
            while True:
                try:
                    sequence.yields = False
                    with self._lock:
                        if ticket in self._line:
                            self._line.remove(ticket)
                        self._freed.notify_all()
                    break
                except BaseException as error:  # Ctrl-C in here: those behind would wait for ever
                    struck = error
            if struck is not None:
                raise struck

    def released(self) -> None:
        """Somebody is done with a slot."""
        with self._lock:
            self._freed.notify_all()


def graph_file(graph: GraphEntry) -> str:
    """The graph that this engine runs."""
    return graph.logit_rows or graph.last_row or graph.file


def open_engine(request: OpenRequest) -> Engine:
    """Load a bundle's CPU graph; see `EngineModule.open_engine`."""
    entry, manifest = request.place.choice.graph, request.manifest
    assert entry is not None, "the NPU's graphs are another engine's"
    name = graph_file(entry)
    packed = request.prepacked  # runtime/prepacked/ compares it with its own record
    opened = DecoderGraph(
        request.folder / name if packed is None else packed / GRAPH,
        request.hashes[name] if packed is None else None,
        threads=request.threads,
        spinning=request.place.choice.spinning.on,
        packed=packed is not None,
        kleidiai=request.place.choice.may_use_kleidiai,
    )
    facts, prompts = {"kv_type": opened.kv_type.name}, None
    if request.prompts is not None:
        prompts = DecoderGraph(
            request.prompts / GRAPH,
            None,  # runtime/integers/cache.py compares it with its own record
            threads=request.threads,
            spinning=request.place.choice.spinning.on,
            packed=True,
            kleidiai=request.place.choice.may_use_kleidiai,
        )
        facts["prefill"] = f"integers {entry_digest(request.prompts)}"
    return OnnxEngine(
        opened,
        context_length=request.config.context_length,
        rope_switch=manifest.model.rope_switch,
        max_parallel=request.max_parallel,
        prefix_bytes=request.prefix_bytes,
        speculation=request.speculation,
        key=cache_key(manifest, "onnx", **facts),
        prompts=prompts,
    )
