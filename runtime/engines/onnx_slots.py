"""Which sequence has which place in the pool of KV caches, and what becomes of what it leaves there.

One thread at a time is in here: everything runs inside of the engine's scheduler.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgephi.devices.memory import return_freed_memory
from edgephi.errors import EngineError
from edgephi.runtime.engines.base import CAPACITY_STEP, capacity_for, common_prefix
from edgephi.runtime.engines.onnx_graph import DecoderGraph, KvPool
from edgephi.runtime.prefix_cache import PrefixCache, PrefixStatistics, Rows

if TYPE_CHECKING:
    from onnxruntime import RunOptions

    from edgephi.runtime.adapters import Adapter
    from edgephi.runtime.engines.onnx_sequence import OnnxSequence

Scope = str | tuple[str, str] | None
"""Whose caches a sequence may begin with: its scope, with its adapter's hash where it has one; None: nobody's."""
Kind = tuple[bool, Scope]
"""Long rope or short, and the scope: what two sequences have in common that share a prefix."""

WORTH_KEEPING = 16
"""Fewer tokens are not kept: finding them again gains less than keeping them costs."""
RESTS_AFTER_S = 1.0
"""A sequence that was not asked for so long may lose its slot to another thread's."""
KEPT_CAPACITY = 16 * CAPACITY_STEP
"""A pool for longer sequences is given back when all of them have ended."""


@dataclass(eq=False)
class Slot:
    """A place in the pool."""

    index: int
    tokens: list[int] = field(default_factory=list)
    """Whose keys and values are there; the list of the sequence that has the slot."""
    kind: Kind = (False, None)
    adapter: Adapter | None = None
    """What its tokens are computed with; it changes inside of the scheduler only, where no run is under way."""
    used: float = 0.0
    _owner: weakref.ref[OnnxSequence] | None = None

    @property
    def owner(self) -> OnnxSequence | None:
        """The sequence that has it; one that nobody refers to any more has nothing."""
        return None if self._owner is None else self._owner()

    @owner.setter
    def owner(self, sequence: OnnxSequence | None) -> None:
        self._owner = None if sequence is None else weakref.ref(sequence)

    def hold(self, start: int, tokens: Sequence[int]) -> None:
        """Tokens were computed behind the first `start`."""
        if len(self.tokens) >= start:  # fewer: Ctrl-C in the sequence's thread, which then rewound or closed it
            self.tokens[start:] = tokens
        self.used = time.monotonic()


class Slots:
    """The pool, its slots and the prefix cache of one model.

    Args:
        most: slots; they are made when they are needed.
        context_length: no sequence is longer.
        rope_switch: longest sequence that takes the short rope, in a model with two.
        prefix_bytes: limit of the prefix cache.
        prompts: the graph that computes prompts, where it is another.
    """

    def __init__(
        self,
        graph: DecoderGraph,
        *,
        most: int,
        context_length: int,
        rope_switch: int | None,
        prefix_bytes: int,
        prompts: DecoderGraph | None = None,
    ) -> None:
        self._graph, self._pool = graph, KvPool(graph, prompts)
        self._most, self._context_length, self._rope_switch = most, context_length, rope_switch
        self._slots: list[Slot] = []
        self._prefixes = PrefixCache(prefix_bytes)
        self._lookups = self._hits = self._prompt_tokens = self._reused_tokens = 0
        self.lock = threading.Lock()
        """Held while a sequence begins a call, and while it loses its slot: not both at once."""

    @property
    def statistics(self) -> PrefixStatistics:
        """What was found of prompts, and what is kept."""
        cache = self._prefixes
        return PrefixStatistics(
            lookups=self._lookups,
            hits=self._hits,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
            stored_tokens=cache.stored_tokens,
            stored_bytes=cache.stored_bytes,
            limit_bytes=cache.limit_bytes,
            pinned=cache.pinned,
            evicted_tokens=cache.evicted_tokens,
        )

    def count(self, prompt_tokens: int, reused: int) -> None:
        """Enter a prompt into the statistics. Any thread may call it."""
        with self.lock:
            self._lookups += 1
            self._hits += reused > 0
            self._prompt_tokens += prompt_tokens
            self._reused_tokens += reused

    def place(self, sequence: OnnxSequence, wanted: Sequence[int], kind: Kind, held: Rows | None) -> bool:
        """Give a sequence a slot with the longest part of `wanted` that can be found.

        Args:
            held: rows of the sequence's own for the first of these tokens.

        Returns:
            False: every slot is in use.
        """
        self._shrink(sequence.capacity)
        slot = self._choose(sequence, wanted, kind)
        if slot is None:
            return False
        with self.lock:
            owner = slot.owner
            if owner is not None and owner is not sequence and owner.busy and not owner.yields:
                return False
            common = common_prefix(slot.tokens, wanted) if self._shares(slot, sequence, kind) else 0
            if owner is not None:  # the sequence too: what follows may fail
                owner.lose_slot()
            slot.owner = None
        if sequence.slot >= 0:
            self.release(sequence)
            sequence.lose_slot()
        self._remember(slot, common)
        if self._pool.capacity < sequence.capacity:
            self._enlarge(len(self._slots), sequence.capacity)
        found, pieces = self._prefixes.match(kind, wanted) if kind[1] is not None else (0, [])
        if held is not None and min(held.shape[2], len(wanted)) > found:
            found = min(held.shape[2], len(wanted))
            pieces = [held[:, :, :found]]
        # the list may be that of a sequence that has lost the slot, so this is another one
        slot.tokens, slot.kind, slot.adapter = slot.tokens[:common], kind, sequence.adapter
        if found > common:
            start = 0
            for piece in pieces:
                skipped = min(max(common - start, 0), piece.shape[2])
                self._pool.write(slot.index, start + skipped, piece[:, :, skipped:])
                start += piece.shape[2]
            slot.tokens = list(wanted[:found])
        slot.used = time.monotonic()
        slot.owner = sequence  # first: a sequence that believes it has a slot must have it
        sequence.take_slot(slot.index, slot.tokens, is_long=kind[0])
        return True

    def release(self, sequence: OnnxSequence) -> None:
        """Take a sequence's slot; the next one may begin with what is there. Any thread may call it."""
        with self.lock:
            for slot in self._slots:
                if slot.owner is sequence:
                    slot.tokens = [] if slot.kind[1] is None else list(slot.tokens)
                    slot.owner = None

    def read(self, slot: int, length: int) -> Rows:
        """A copy of the first rows of a slot."""
        return self._pool.read(self._in_use(slot).index, 0, length)

    def pin(self, slot: int) -> Callable[[], None]:
        """Keep what a slot holds until the function that is returned is called, inside of the scheduler."""
        place = self._in_use(slot)
        return self._prefixes.pin(place.kind, place.tokens, lambda start, stop: self._pool.read(slot, start, stop))

    def prefill(self, slot: int, tokens: Sequence[int], start: int, options: RunOptions | None) -> NDArray[np.float32]:
        """Compute tokens of one sequence behind its first `start`; logits [vocabulary] of the last."""
        place = self._in_use(slot)
        ids = np.asarray(tokens, np.int64)[None]
        how: dict[str, Any] = {"long_rope": place.kind[0], "options": options, "adapter": place.adapter}
        run = self._pool.run(slot, ids, [start], is_prompt=True, **how)
        place.hold(start, tokens)
        return np.array(run[0, -1], np.float32)  # a copy: the memory is that of the next run

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """As `prefill`, with logits [tokens, vocabulary] of all of them."""
        place = self._in_use(slot)
        ids, rows = np.asarray(tokens, np.int64)[None], np.arange(len(tokens), dtype=np.int64)
        logits = self._pool.run(slot, ids, [start], rows=rows, long_rope=place.kind[0], adapter=place.adapter)[0]
        place.hold(start, tokens)
        return np.array(logits, np.float32)

    def step(self, sequences: Sequence[OnnxSequence]) -> list[NDArray[np.float32]]:
        """One token for each sequence, `OnnxSequence.entering`; logits [vocabulary] each. Those of one adapter take one
        run together.

        One that was closed meanwhile gets none, and finds out by itself.
        """
        entering = {index: sequence.entering for sequence in sequences if (index := sequence.slot) >= 0}
        logits = {-1: np.empty(0, np.float32)}
        for window in self._windows([self._slots[index] for index in entering]):
            together = {slot.index for slot in window}
            first, last = window[0].index, window[-1].index
            ids, past = np.zeros((last - first + 1, 1), np.int64), []
            for row, slot in enumerate(self._slots[first : last + 1]):
                if slot.index in together:
                    ids[row], start = entering[slot.index]
                    past.append(start)
                else:  # a bystander: what is written behind its tokens, the next one overwrites
                    past.append(len(slot.tokens))
            computed = self._pool.run(first, ids, past, long_rope=window[0].kind[0], adapter=window[0].adapter)
            for slot in window:
                token, start = entering[slot.index]
                logits[slot.index] = computed[slot.index - first, -1].astype(np.float32)
                slot.hold(start, [token])
        return [logits.get(sequence.slot, logits[-1]) for sequence in sequences]

    def free(self) -> None:
        """Give all memory back."""
        self._prefixes.clear()
        self._slots = []
        self._pool.free()

    def _in_use(self, slot: int) -> Slot:
        """Raises EngineError for the slot of a sequence that another thread has closed."""
        if slot < 0:
            raise EngineError("this answer's model was closed", remedy="Load the bundle again with `edgephi.load`")
        return self._slots[slot]

    def _windows(self, slots: Sequence[Slot]) -> list[list[Slot]]:
        """What one run takes: slots of one adapter and one rope, with nothing between them that must not be computed
        with them."""
        windows: list[list[Slot]] = []
        order = {adapter: place for place, adapter in enumerate(dict.fromkeys(slot.adapter for slot in slots))}
        for slot in sorted(slots, key=lambda one: (order[one.adapter], one.index)):
            if windows and windows[-1][-1].adapter is slot.adapter:
                before = windows[-1][-1]
                between = self._slots[before.index + 1 : slot.index]
                long_rope = slot.kind[0]
                # one that asked too, and has another adapter, may have its new token by then
                may = [self._may_stand_by(other, long_rope, len(other.tokens) + (other in slots)) for other in between]
                if before.kind[0] == long_rope and all(may):
                    windows[-1].append(slot)
                    continue
            windows.append([slot])
        return windows

    def _may_stand_by(self, slot: Slot, long_rope: bool, length: int) -> bool:
        """Whether a run may add a token to a slot of this length that is not to be computed: there is room, and its
        rope is the run's."""
        fits = self._rope_switch is None or length < self._rope_switch or long_rope
        return length < self._pool.capacity and fits and (not length or slot.kind[0] == long_rope)

    def _choose(self, sequence: OnnxSequence, wanted: Sequence[int], kind: Kind) -> Slot | None:
        shared = {
            slot.index: common_prefix(slot.tokens, wanted) if self._shares(slot, sequence, kind) else 0
            for slot in self._slots
            if slot.owner is None or slot.owner is sequence
        }
        slots = self._slots
        best = max(shared, key=lambda i: (shared[i], not slots[i].tokens, -slots[i].used), default=None)
        if best is not None:
            return self._slots[best]
        if len(self._slots) < self._most:
            self._enlarge(len(self._slots) + 1, sequence.capacity)
            return self._slots[-1]
        now = time.monotonic()
        resting = [
            slot
            for slot in self._slots
            if (owner := slot.owner) is not None
            and (
                owner.yields
                or (not owner.busy and (owner.thread == sequence.thread or now - slot.used > RESTS_AFTER_S))
            )
        ]
        return min(resting, key=lambda slot: slot.used, default=None)

    def _shares(self, slot: Slot, sequence: OnnxSequence, kind: Kind) -> bool:
        """Whether a sequence may begin with what is in a slot."""
        return slot.kind == kind and (kind[1] is not None or sequence.slot == slot.index)

    def _remember(self, slot: Slot, common: int) -> None:
        """Keep what the slot holds beyond what its next owner begins with."""
        tokens = slot.tokens
        if slot.kind[1] is None or len(tokens) - common < WORTH_KEEPING:
            return
        if len(tokens) * self._graph.bytes_per_token <= self._prefixes.limit_bytes:
            with suppress(EngineError):  # no memory: it is computed again
                self._prefixes.insert(slot.kind, tokens, lambda start, stop: self._pool.read(slot.index, start, stop))

    def _enlarge(self, slots: int, needed: int) -> None:
        capacity = self._pool.capacity
        if needed > capacity:  # doubled, so that a conversation is not copied at every turn
            capacity = max(needed, min(capacity_for(2 * capacity, self._context_length), self._context_length))
        self._pool.grow(slots, capacity, [len(slot.tokens) for slot in self._slots])
        self._slots += [Slot(index) for index in range(len(self._slots), slots)]

    def _shrink(self, needed: int) -> None:
        """Give back what a long sequence needed, once nobody has a slot."""
        if self._pool.capacity <= max(KEPT_CAPACITY, needed) or any(slot.owner for slot in self._slots):
            return
        for slot in self._slots:
            self._remember(slot, 0)
        self._slots = []
        self._pool.free()
        return_freed_memory()
