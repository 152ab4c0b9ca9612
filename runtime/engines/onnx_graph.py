"""A decoder graph in a session of onnxruntime, and the KV cache its runs read and write in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from edgephi.adapter_file import LORA_ENDINGS
from edgephi.bundle import LOGIT_ROWS, ROPE_SWITCH, read_unchanged
from edgephi.errors import EngineError, library_errors
from edgephi.ort import open_session, session_options
from edgephi.runtime.prefix_cache import Rows
from edgephi.runtime.speculation import repeats_exactly

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue, RunOptions

    from edgephi.runtime.adapters import Adapter

KV_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
VERIFIED = (2, 5, 9)
"""Tokens of the runs that are compared with runs of one: kernels change with the number of rows."""
VERIFIED_ROWS = 32
"""Of the cache in which they are compared."""
KEPT_OUTPUTS = 32
"""Rows of logits up to which their memory is kept for the next run: drafts have a few, evaluation has hundreds."""


class DecoderGraph:
    """A session and the shape of its cache. Runs are not locked: the engine makes them one at a time.

    Args:
        graph: the file, or its prepacked form.
        sha256: of the file, as the manifest has it; None: not compared.
        packed: the graph was optimized before and its weights lie as this processor's kernels read them.
        kleidiai: on an Arm processor, whether KleidiAI may compute.

    Raises:
        BundleError: the graph was changed since it was checked.
        EngineError: onnxruntime refuses it, or it is not a decoder whose cache is written in place.
    """

    def __init__(
        self,
        graph: Path,
        sha256: str | None,
        *,
        threads: int,
        spinning: bool,
        packed: bool,
        kleidiai: bool = True,
    ) -> None:
        options = session_options(
            threads=threads,
            spinning=spinning,
            optimizations="none" if packed else "all",
            kleidiai=kleidiai,
            data_folder=graph.parent,
        )
        self.session = open_session(
            read_unchanged(graph, sha256), options, where=graph, remedy="Check the bundle with `edgephi verify`"
        )
        ports = {port.name: port for port in self.session.get_inputs()}
        optional = {port.name for port in self.session.get_overridable_initializers()}
        self.picks_rows = LOGIT_ROWS in optional
        """Whether a run can say which of its tokens get logits; else the last one does, or all do."""
        self.switches_rope = ROPE_SWITCH in optional
        self.adapter_inputs = _adapter_inputs(self.session)
        """Names of the inputs that take a LoRA adapter, and what has no effect there: tensors of rank 0."""
        self._adapted: WeakKeyDictionary[Adapter, dict[str, OrtValue]] = WeakKeyDictionary()
        self.layers = sum(name.startswith("past_key_values.") and name.endswith(".key") for name in ports)
        cache, logits = ports.get("past_key_values.0.key"), self.session.get_outputs()[0]
        unknown = set(ports) - {"input_ids", "attention_mask"} - set(_cache_names("past_key_values", self.layers))
        if cache is None or cache.type not in KV_TYPES or unknown or logits.name != "logits":
            raise EngineError(
                "the graph is not one whose KV cache this engine can own: "
                + (min(unknown) if unknown else "its cache"),
                where=graph,
                remedy="Load the bundle with engine='genai'",
            )
        self.kv_heads, self.head_dim = int(cache.shape[1]), int(cache.shape[3])
        self.kv_type = np.dtype(KV_TYPES[cache.type])
        self.vocabulary = int(logits.shape[2])
        self.logits_type = np.dtype(KV_TYPES[logits.type])
        self.all_rows = not self.picks_rows and logits.shape[1] != 1

    @property
    def bytes_per_token(self) -> int:
        """Of the KV cache."""
        return int(2 * self.layers * self.kv_heads * self.head_dim * self.kv_type.itemsize)

    def inputs_for(self, adapter: Adapter | None) -> Mapping[str, OrtValue]:
        """What `adapter_inputs` get; where an adapter has nothing, what has no effect."""
        if adapter is None:
            return self.adapter_inputs
        if adapter not in self._adapted:
            given = {name: _value(values) for name, values in adapter.tensors.items()}
            self._adapted[adapter] = {name: given.get(name, empty) for name, empty in self.adapter_inputs.items()}
        return self._adapted[adapter]

    def close(self) -> None:
        """Free the weights."""
        self.session = None


class KvPool:
    """The caches of several sequences, [slots, kv_heads, capacity, head_dim] for the keys and the values of each layer.

    A run computes one token for consecutive slots, or several tokens for one. Memory that was never written to costs
    nothing on Linux and macOS, and on Windows counts as promised, not as used.

    Args:
        graph: computes the tokens of answers, and those of prompts unless `prompts` does.
        prompts: a graph with the same cache.
    """

    def __init__(self, graph: DecoderGraph, prompts: DecoderGraph | None = None) -> None:
        self._graph, self._prompts = graph, prompts or graph
        self.slots = self.capacity = 0
        self._arrays: list[NDArray[Any]] = []
        self._views: dict[tuple[int, int, bool], _View] = {}

    def grow(self, slots: int, capacity: int, lengths: Sequence[int]) -> None:
        """Make room; `lengths` says how many rows of each slot are worth keeping.

        Raises:
            EngineError: there is no memory. What was there stays.
        """
        graph, made = self._graph, []
        shape = (slots, graph.kv_heads, capacity, graph.head_dim)
        try:
            for index in range(2 * graph.layers):
                new = np.zeros(shape, graph.kv_type)
                for slot, length in enumerate(lengths):
                    new[slot, :, :length] = self._arrays[index][slot, :, :length]
                made.append(new)
        except (MemoryError, ValueError) as error:
            raise EngineError(
                f"there is no memory for a KV cache of {slots} x {capacity:,} tokens",
                where="KV cache",
                remedy="Ask for fewer tokens, or close other programs",
            ) from error
        self._views.clear()
        self._arrays, self.slots, self.capacity = made, slots, capacity

    def read(self, slot: int, start: int, stop: int) -> Rows:
        """A copy of the rows [start, stop) of a slot.

        Raises:
            EngineError: there is no memory.
        """
        graph = self._graph
        try:
            rows = np.empty((len(self._arrays), graph.kv_heads, stop - start, graph.head_dim), graph.kv_type)
        except MemoryError as error:
            raise EngineError(
                f"there is no memory for a copy of {stop - start:,} tokens",
                where="KV cache",
                remedy="Close other programs, or fork and keep less",
            ) from error
        for index, array in enumerate(self._arrays):
            rows[index] = array[slot, :, start:stop]
        return rows

    def write(self, slot: int, start: int, rows: Rows) -> None:
        """Copy rows into a slot."""
        stop = start + rows.shape[2]
        for array, part in zip(self._arrays, rows, strict=True):
            array[slot, :, start:stop] = part

    def run(
        self,
        first: int,
        ids: NDArray[np.int64],
        past: Sequence[int],
        *,
        rows: NDArray[np.int64] | None = None,
        long_rope: bool = False,
        options: RunOptions | None = None,
        adapter: Adapter | None = None,
        is_prompt: bool = False,
    ) -> NDArray[Any]:
        """Compute tokens [count, length] of `count` slots from `first` on, each behind `past` tokens of its own.

        Args:
            rows: which of the tokens get logits; None: the last.
            long_rope: of a graph with two.
            adapter: of all these tokens.
            is_prompt: whether the graph for prompts computes them; `count` is 1 then.

        Returns:
            Logits [count, rows, vocabulary]; the memory is used again by the next run.

        Raises:
            EngineError: onnxruntime failed, or was told to stop.
        """
        key = (first, len(ids), is_prompt)
        if key not in self._views:
            graph = self._prompts if is_prompt else self._graph
            self._views[key] = _View(graph, [array[first : first + len(ids)] for array in self._arrays])
        return self._views[key].run(ids, past, rows, long_rope, options, adapter)

    def free(self) -> None:
        """Give the memory back."""
        self._views.clear()
        self._arrays, self.slots, self.capacity = [], 0, 0


class _View:
    """Consecutive slots, bound to the session as past and as present: onnxruntime adds rows in place."""

    def __init__(self, graph: DecoderGraph, arrays: Sequence[NDArray[Any]]) -> None:
        self._graph, count = graph, arrays[0].shape[0]
        self._binding = graph.session.io_binding()
        self._values = [_value(array) for array in arrays]  # onnxruntime has pointers only
        pasts, presents = (_cache_names(kind, graph.layers) for kind in ("past_key_values", "present"))
        for value, past, present in zip(self._values, pasts, presents, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._ones = np.ones((count, arrays[0].shape[2]), np.int64)
        self._outputs: dict[int, tuple[NDArray[Any], OrtValue]] = {}
        self._short, self._long = (_value(np.full(1, value, np.int64)) for value in (2**62, 0))
        self._adapter: Adapter | None = None
        self._is_bound = True
        """The adapter is; False: Ctrl-C struck while another was being bound."""

    def run(
        self,
        ids: NDArray[np.int64],
        past: Sequence[int],
        rows: NDArray[np.int64] | None,
        long_rope: bool,
        options: RunOptions | None,
        adapter: Adapter | None,
    ) -> NDArray[Any]:
        (count, length), graph, binding = ids.shape, self._graph, self._binding
        mask = self._ones[:, : max(past) + length]
        if count > 1:  # the graph reads the lengths from the sums of the rows
            mask = (np.arange(mask.shape[1]) < np.asarray(past)[:, None] + length).astype(np.int64)
        chosen = length if graph.all_rows else 1
        with library_errors("onnxruntime", where="prefill or decode", remedy="Load the model again"):
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_cpu_input("attention_mask", mask)
            if graph.picks_rows:
                rows = np.full(1, length - 1, np.int64) if rows is None else rows
                chosen = len(rows)
                binding.bind_ortvalue_input(LOGIT_ROWS, _value(rows))  # bind_cpu_input refuses optional inputs
            if adapter is not self._adapter or not self._is_bound:
                self._bind(adapter)
            if graph.switches_rope:
                binding.bind_ortvalue_input(ROPE_SWITCH, self._long if long_rope else self._short)
            logits, output = self._output(count, chosen)
            binding.bind_ortvalue_output("logits", output)
            graph.session.run_with_iobinding(binding, options)
        return logits

    def _bind(self, adapter: Adapter | None) -> None:
        """Bind an adapter's tensors, because a run with a binding does not look at the adapters in its options."""
        self._is_bound = False
        for name, value in self._graph.inputs_for(adapter).items():
            self._binding.bind_ortvalue_input(name, value)
        self._adapter, self._is_bound = adapter, True

    def _output(self, count: int, rows: int) -> tuple[NDArray[Any], OrtValue]:
        if rows in self._outputs:
            return self._outputs[rows]
        array = np.empty((count, rows, self._graph.vocabulary), self._graph.logits_type)
        pair = array, _value(array)
        if rows <= KEPT_OUTPUTS:
            self._outputs[rows] = pair
        return pair


def verifies_exactly(graph: DecoderGraph, adapter: Adapter | None = None) -> bool:
    """Whether a run of several tokens gives, for each, the logits of a run of that token alone, bit for bit."""
    pool = KvPool(graph)
    pool.grow(1, VERIFIED_ROWS, [])

    def run(tokens: list[int], past: int) -> NDArray[Any]:
        rows = np.arange(len(tokens), dtype=np.int64)
        logits: NDArray[Any] = pool.run(0, np.asarray(tokens, np.int64)[None], [past], rows=rows, adapter=adapter)[0]
        return logits

    try:
        return repeats_exactly(run, graph.vocabulary, VERIFIED)
    finally:
        pool.free()


def _cache_names(kind: str, layers: int) -> list[str]:
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _adapter_inputs(session: InferenceSession) -> dict[str, OrtValue]:
    import onnxruntime

    empty = {}
    for port in session.get_overridable_initializers():
        if port.name.endswith(LORA_ENDINGS):
            shape = [size if isinstance(size, int) else 0 for size in port.shape]
            values = np.zeros(shape, KV_TYPES[port.type])
            empty[port.name] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
    return empty


def _value(array: NDArray[Any]) -> OrtValue:
    """An array as onnxruntime sees it; on the CPU that is the same memory."""
    import onnxruntime

    value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    assert value.data_ptr() == array.ctypes.data, "onnxruntime copied the array"
    return value
