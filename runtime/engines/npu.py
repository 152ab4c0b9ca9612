"""A bundle for a Hexagon NPU: checked, loaded wholly onto the NPU or its simulator, and run.

onnxruntime-genai runs the folder as it is (`decoder-pipeline`), a prompt and its answer at a time. It cannot rewind,
and in 0.18 a second prompt on the same cache enters it at the wrong rows (src/models/input_ids.cpp counts tokens and
padding apart and mixes them up). A conversation needs both, so edgephi feeds the same graphs itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import GraphEntry, Manifest, NpuFacts, check_bundle, read_manifest
from edgephi.devices.hexagon import installed_qairt
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import BundleError, EngineError, PromptError, library_errors
from edgephi.ort import CPU
from edgephi.runtime.engines.base import OpenRequest, common_prefix, require_in_vocabulary
from edgephi.runtime.engines.npu_checks import (
    Chip,
    NpuDevice,
    chip_of,
    load_in_child,
    require_chip,
    require_context,
    require_loadable,
    require_runtime,
    require_unchanged,
)
from edgephi.runtime.engines.npu_session import open_on_cpu, placement_of
from edgephi.runtime.engines.npu_stages import LoadedStage, load_stages
from edgephi.runtime.placement import Placement
from edgephi.runtime.sampling import Chooser


def graph_file(graph: GraphEntry) -> str:
    """Not asked: the NPU's graphs are in the manifest's `npu`."""
    return graph.file


def open_engine(request: OpenRequest) -> NpuEngine:
    """Load a bundle onto the NPU or the simulator that was chosen; the errors are those of `open_npu`."""
    choice = request.place.choice
    device: NpuDevice = "npu" if choice.kinds == ("npu",) else "npu-simulator"
    return open_npu(
        request.folder,
        device,
        chip=chip_of(choice.options),
        threads=request.threads,
        spinning=choice.spinning.on,
    )


def open_npu(
    folder: Path, device: NpuDevice, *, chip: Chip | None = None, threads: int = 1, spinning: bool = False
) -> NpuEngine:
    """Load a bundle onto the NPU, or onto its simulator.

    Args:
        folder: what `edgephi export --device snapdragon-...` wrote.
        device: "npu-simulator" computes on the CPU what the NPU would, thousands of times slower.
        chip: the machine's; the simulator takes the bundle's.
        threads: of the CPU, for embedding, head and, where tokens are the CPU's, these.
        spinning: whether idle ones wait actively.

    Raises:
        BundleError: a file was changed, or the bundle is for another chip or none, or for a newer QAIRT.
        DeviceError: the provider or the device is missing.
        EngineError: a binary cannot be loaded, or not wholly.
    """
    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    check_bundle(folder, manifest, every_byte=False)
    facts = manifest.npu
    if facts is None:
        raise BundleError(
            "the bundle has no graphs for an NPU",
            where=folder,
            remedy="Export the model with --device snapdragon-x-elite",
        )
    require_chip(folder, facts, chip)
    require_loadable(folder, facts, device)
    require_runtime(folder, facts, installed_qairt())
    for stage in facts.stages:
        require_unchanged(folder, manifest, stage)
        require_context(folder, facts, stage)
    load_in_child(folder, facts, device)
    return NpuEngine(folder, manifest, facts, device, threads, spinning=spinning)


class NpuEngine:
    """The sessions of a bundle; sequences share them. Made by `open_npu`."""

    def __init__(
        self, folder: Path, manifest: Manifest, facts: NpuFacts, device: NpuDevice, threads: int, *, spinning: bool
    ) -> None:
        self.facts = facts
        self.device = device
        self._embedding = open_on_cpu(folder / facts.embedding, threads, spinning=spinning)
        self._head = open_on_cpu(folder / facts.head, threads, spinning=spinning)
        self._stages = load_stages(folder, facts, device, threads, spinning=spinning)
        self._cache_shape = (1, manifest.model.kv_heads, facts.cache_rows, manifest.model.head_dim)
        self._cache_type = np.dtype(facts.kv_cache)
        self._layers = manifest.model.layers
        self._vocabulary = manifest.model.vocabulary_size
        self._open = True
        self._sequences: weakref.WeakSet[NpuSequence] = weakref.WeakSet()
        self.placements: tuple[Placement, ...] = (
            placement_of(self._embedding, folder / facts.embedding, CPU),
            *(stage.placement for stage in self._stages),
            placement_of(self._head, folder / facts.head, CPU),
        )
        """Where the nodes of every graph are, read back from the sessions that run."""

    @property
    def simulated(self) -> bool:
        """Whether the CPU computes in the NPU's place."""
        return self.device == "npu-simulator"

    def require_open(self) -> None:
        """Raises EngineError once the model is closed."""
        if not self._open:
            raise EngineError("this model is closed", remedy="Load the bundle again with `edgephi.load`")

    def sequence(self, capacity: int, *, scope: str | None = None) -> NpuSequence:
        """An empty sequence for `capacity` tokens; its KV cache has the graphs' fixed size.

        Raises:
            EngineError: the model is closed.
            PromptError: the capacity is larger than the context.
        """
        self.require_open()
        if capacity > self.facts.context_length:
            raise PromptError(
                f"{capacity:,} tokens are asked for, and the NPU's graphs have a context of "
                f"{self.facts.context_length:,}",
                remedy="Shorten the prompt or ask for fewer tokens",
            )
        try:
            cache = KvCache(self._layers, self._cache_shape, self._cache_type)
        except (MemoryError, ValueError) as error:
            raise EngineError(
                f"there is no memory for a KV cache of {self.facts.cache_rows:,} tokens in {self._layers} layers",
                where="KV cache",
                remedy="Close other programs, or export the model again with a shorter context",
            ) from error
        whole = self.facts.tokens_on != "npu"
        engine = NpuSequence(
            self._run, self._logits, cache, self.facts.chunk, capacity, self._vocabulary, whole_chunks=whole
        )
        self._sequences.add(engine)
        return engine

    def _run(self, tokens: Sequence[int], past: int, cache: KvCache) -> NDArray[np.float16]:
        """Hidden states [1, n, hidden] of n tokens, as many as a graph takes; their keys and values enter the cache."""
        phase = "decode" if len(tokens) == 1 else "prefill"
        ids = np.asarray(tokens, np.int64)[None]
        with library_errors("onnxruntime", where=self.facts.embedding, remedy="Load the model again"):
            hidden: NDArray[np.float16] = self._embedding.run(None, {"input_ids": ids})[0]
        for stage in self._stages:
            if stage.phase == phase:
                hidden = self._run_stage(stage, hidden, past + len(tokens) - 1, cache)
        return hidden

    def _run_stage(
        self, stage: LoadedStage, hidden: NDArray[np.float16], last: int, cache: KvCache
    ) -> NDArray[np.float16]:
        with library_errors("onnxruntime", where=stage.graph, remedy="Load the model again"):
            binding = stage.session.io_binding()
            binding.bind_cpu_input(f"hidden_states.{stage.first_layer}", hidden)
            binding.bind_cpu_input("past_sequence_length", np.full((1, 1), last, np.int32))
            binding.bind_cpu_input("total_sequence_length", np.full(1, self.facts.cache_rows, np.int32))
            binding.bind_output(f"hidden_states.{stage.last_layer}")
            for layer in range(stage.first_layer, stage.last_layer):
                for part, value in zip(("key", "value"), cache.values[layer], strict=True):
                    binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", value)
                    binding.bind_ortvalue_output(f"present.{layer}.{part}", value)
            stage.session.run_with_iobinding(binding)
            computed: NDArray[np.float16] = binding.get_outputs()[0].numpy()
        return computed

    def _logits(self, hidden: NDArray[np.float16]) -> NDArray[np.float32]:
        """Logits [vocabulary] of hidden states [1, 1, hidden]."""
        with library_errors("onnxruntime", where=self.facts.head, remedy="Load the model again"):
            logits: NDArray[np.float32] = self._head.run(None, {f"hidden_states.{self._layers}": hidden})[0][0, 0]
        return logits

    def close(self) -> None:
        """Free the sequences, then the sessions; more than once is allowed."""
        for engine in list(self._sequences):
            engine.close()
        self._open = False
        self._stages = ()
        self._embedding = self._head = None


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


Run = Callable[[Sequence[int], int, KvCache], NDArray[np.float16]]


class NpuSequence:
    """One sequence and its KV cache (the `KvSequence` protocol). Made by `NpuEngine.sequence`.

    A prompt is computed in chunks of a fixed number of tokens, the last one padded. What padding leaves in the cache
    lies behind the sequence, where nothing looks, until the next tokens overwrite it; that is also how a rewind works.

    Args:
        whole_chunks: a piece of the prompt of one token is padded too, because tokens are another provider's.
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
    ) -> None:
        self._run, self._logits = run, logits
        self._cache: KvCache | None = cache
        self._chunk, self._vocabulary, self._whole_chunks = chunk, vocabulary, whole_chunks
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
