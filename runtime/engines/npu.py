"""A bundle for a Hexagon NPU: checked, loaded wholly onto the NPU or its simulator, and run.

onnxruntime-genai runs the folder as it is (`decoder-pipeline`), a prompt and its answer at a time. It cannot rewind,
and in 0.18 a second prompt on the same cache enters it at the wrong rows (src/models/input_ids.cpp counts tokens and
padding apart and mixes them up). A conversation needs both, so edgephi feeds the same graphs itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import GraphEntry, Manifest, NpuFacts, check_bundle, read_manifest
from edgephi.devices.hexagon import installed_qairt
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import BundleError, EngineError, PromptError, library_errors
from edgephi.ort import CPU
from edgephi.runtime.adapters import Adapter
from edgephi.runtime.engines.base import Abilities, Engine, OpenRequest, cannot, speculation_in_words
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
from edgephi.runtime.engines.npu_sequence import (
    KvCache,
    NpuGraphs,
    NpuSequence,
    memory_for_cache,
    verifies_exactly,
)
from edgephi.runtime.engines.npu_session import open_on_cpu, placement_of
from edgephi.runtime.engines.npu_stages import LoadedStage, load_stages
from edgephi.runtime.engines.saved_cache import cache_key, read_cache
from edgephi.runtime.placement.nodes import Placement

ABILITIES = Abilities(rewind=True, fork=True, save=True, batch=False)


def graph_file(graph: GraphEntry) -> str:
    """Not asked: the NPU's graphs are in the manifest's `npu`."""
    return graph.file


def open_engine(request: OpenRequest) -> Engine:
    """Load a bundle onto the NPU or the simulator that was chosen; the errors are those of `open_npu`."""
    choice = request.place.choice
    device: NpuDevice = "npu" if choice.kinds == ("npu",) else "npu-simulator"
    return open_npu(
        request.folder,
        device,
        chip=chip_of(choice.options),
        threads=request.threads,
        spinning=choice.spinning.on,
        kleidiai=choice.may_use_kleidiai,
        speculation=request.speculation,
    )


def open_npu(
    folder: Path,
    device: NpuDevice,
    *,
    chip: Chip | None = None,
    threads: int = 1,
    spinning: bool = False,
    kleidiai: bool = True,
    speculation: bool | None = None,
) -> NpuEngine:
    """Load a bundle onto the NPU, or onto its simulator.

    Args:
        folder: what `edgephi export --device snapdragon-...` wrote.
        device: "npu-simulator" computes on the CPU what the NPU would, thousands of times slower.
        chip: the machine's; the simulator takes the bundle's.
        threads: of the CPU, for embedding, head and, where tokens are the CPU's, these.
        spinning: whether idle ones wait actively.
        kleidiai: on an Arm processor, whether KleidiAI may compute tokens.
        speculation: whether guessed tokens are verified in the prompt's graph; None: where that changes no answer.

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
    how = {"spinning": spinning, "kleidiai": kleidiai}
    return NpuEngine(folder, manifest, facts, device, threads, **how, speculation=speculation)


def may_repeat_exactly(facts: NpuFacts) -> bool:
    """Whether prompt and token graphs of a bundle can agree bit for bit; on which machine they do is measured.

    Not where the CPU computes tokens in float32 and the NPU prompts in float16. And not with a KV cache of 8 bits: the
    tokens of one run read each other's keys and values before these are rounded, later runs read them rounded.
    """
    return facts.tokens_on == "npu" and facts.kv_cache == "float16"


class NpuEngine:
    """The sessions of a bundle (the `Engine` protocol); sequences share them. Made by `open_npu`."""

    abilities = ABILITIES

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        facts: NpuFacts,
        device: NpuDevice,
        threads: int,
        *,
        spinning: bool,
        kleidiai: bool = True,
        speculation: bool | None = None,
    ) -> None:
        self.facts = facts
        self.device = device
        self._embedding = open_on_cpu(folder / facts.embedding, threads, spinning=spinning)
        self._head = open_on_cpu(folder / facts.head, threads, spinning=spinning)
        self._stages = load_stages(folder, facts, device, threads, spinning=spinning, kleidiai=kleidiai)
        self._cache_shape = (1, manifest.model.kv_heads, facts.cache_rows, manifest.model.head_dim)
        self._cache_type = np.dtype(facts.kv_cache)
        self._layers = manifest.model.layers
        self._vocabulary = manifest.model.vocabulary_size
        self._key = cache_key(
            manifest, "npu", device=device, kv_cache=facts.kv_cache, qairt=installed_qairt() or "unknown"
        )
        self._speculation = speculation
        self._may_verify = speculation if speculation is not None or may_repeat_exactly(facts) else False
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

    @property
    def speculation(self) -> str:
        """Whether tokens are guessed, and why, in words for a person."""
        return speculation_in_words(self._speculation, self._may_verify)

    @property
    def may_verify(self) -> bool:
        """Whether guessed tokens are verified together: as asked, or where that changes no answer, which is measured
        when it is first asked."""
        if self._may_verify is None:
            self._may_verify = self.measure_verification()
        return self._may_verify

    def measure_verification(self) -> bool:
        """Whether the prompt's graph gives a token, bit for bit, what the token's graph gives it, on this device.

        Raises:
            EngineError: there is no memory for a KV cache, or the runtime failed.
        """
        return verifies_exactly(self._run, self._cache(), self.facts.chunk, self._vocabulary)

    def sequence(
        self, capacity: int, *, scope: str | None = None, speculate: bool = False, adapter: Adapter | None = None
    ) -> NpuSequence:
        """An empty sequence for `capacity` tokens; its KV cache has the graphs' fixed size.

        Args:
            scope: not used; each sequence has a cache of its own.
            speculate: guess tokens and verify them in the prompt's graph, unless `speculation` says otherwise.

        Raises:
            EngineError: the model is closed, or an adapter is given.
            PromptError: the capacity is larger than the context.
        """
        self.require_open()
        if adapter is not None:
            raise cannot("the NPU's engine", "adapt")
        if capacity > self.facts.context_length:
            raise PromptError(
                f"{capacity:,} tokens are asked for, and the NPU's graphs have a context of "
                f"{self.facts.context_length:,}",
                remedy="Shorten the prompt or ask for fewer tokens",
            )
        graphs = NpuGraphs(
            self._run,
            self._logits,
            self.facts.chunk,
            self._vocabulary,
            whole_chunks=self.facts.tokens_on != "npu",
            may_verify=lambda: self.may_verify,
            key=self._key,
            family=self._sequences,
        )
        return NpuSequence(graphs, self._cache(), capacity, speculate=speculate)

    def restore(
        self, file: Path, capacity: int, *, scope: str | None = None, adapter: Adapter | None = None
    ) -> NpuSequence:
        """The sequence that `NpuSequence.save` wrote.

        Raises:
            EngineError: the engine is closed; or the file is missing, damaged, of another model, QAIRT, onnxruntime or
                device (the simulator counts as another), or holds more tokens than the capacity.
            PromptError: the capacity is larger than the context.
        """
        sequence = self.sequence(capacity, adapter=adapter)
        tensors = sequence.cache.tensors()
        sequence.fill(read_cache(file, self._key, tensors, capacity=capacity, vocabulary=self._vocabulary))
        return sequence

    def _cache(self) -> KvCache:
        """Raises EngineError: there is no memory for it."""
        with memory_for_cache(self.facts.cache_rows, self._layers):
            return KvCache(self._layers, self._cache_shape, self._cache_type)

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
        for sequence in list(self._sequences):
            sequence.close()
        self._open = False
        self._stages = ()
        self._embedding = self._head = None
