"""The engine: a loaded graph and, per sequence, a KV cache. onnxruntime-genai ("og") runs both."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgephi.bundle import LONG_ROPE_ADAPTER, GraphEntry, read_unchanged
from edgephi.devices.memory import return_freed_memory
from edgephi.devices.providers import graph_traits
from edgephi.errors import EngineError, library_errors
from edgephi.runtime.engines.base import Abilities, Engine, OpenRequest, cannot, common_prefix, require_in_vocabulary
from edgephi.runtime.engines.genai_settings import og_config, require_device
from edgephi.runtime.placement.config import decode_file
from edgephi.runtime.prepacked.packing import SWITCH
from edgephi.runtime.sampling import Chooser

if TYPE_CHECKING:
    from edgephi.genai_config import GenaiConfig
    from edgephi.runtime.adapters import Adapter
    from edgephi.runtime.placement.nodes import Placement
    from edgephi.runtime.placement.place import Place

# A prompt is computed in pieces: activations, and logits where a graph has them for every row, grow with the rows
# (SmolLM2, 1,024 tokens: 241 MB at once, 69 MB in these pieces, 13 MB with the last row's logits alone; pieces of 512
# and 1,024 took from 11 % less to 11 % more processor time), and a cancel is heard between two.
PREFILL_CHUNK = 256

ABILITIES = Abilities(rewind=True, fork=False, save=False, batch=False)
TITLE = "onnxruntime-genai"


def graph_file(graph: GraphEntry) -> str:
    """The graph that og runs."""
    return decode_file(graph)


def open_engine(request: OpenRequest) -> Engine:
    """Load a graph; the errors are those of `OgEngine`."""
    return OgEngine(
        request.folder,
        request.config,
        request.place,
        threads=request.threads,
        rope_switch=request.manifest.model.rope_switch,
        prepacked=request.prepacked,
        hashes=request.hashes,
    )


class OgEngine:
    """A graph and its weights in og (the `Engine` protocol); sequences share them.

    Args:
        folder: a bundle that was checked.
        config: its checked configuration.
        place: which graph, on which provider's device.
        threads: of one operator. og behaves like one thread unless told.
        rope_switch: longest sequence the graph rotates with its short rope (LongRoPE), or None. The folder then holds
            an adapter that makes the graph take the long one at any length.
        prepacked: the same graph as this processor's kernels read it (`runtime/prepacked/packing.py`), if there is one.

    Raises:
        EngineError: og refuses the folder.
    """

    abilities = ABILITIES

    def __init__(
        self,
        folder: Path,
        config: GenaiConfig,
        place: Place,
        *,
        threads: int,
        rope_switch: int | None = None,
        prepacked: Path | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        self._vocabulary = config.vocab_size
        self._rope_switch = rope_switch
        self._whole_prompts = graph_traits(place.choice.provider).whole_prompts
        self._sequences: weakref.WeakSet[OgSequence] = weakref.WeakSet()
        remedy = "Check the bundle with `edgephi verify`"
        if prepacked is not None:
            remedy = f"Set {SWITCH}=never, and delete this folder"
        with library_errors("onnxruntime-genai", where=prepacked or folder, remedy=remedy):
            with og_config(folder, config, place, threads, prepacked, hashes=hashes) as settings:
                self._model: Any = og.Model(settings)
            require_device(self._model.device_type, place)
            self._adapters: Any = None
            if rope_switch is not None:
                self._adapters = og.Adapters(self._model)
                read_unchanged(folder / LONG_ROPE_ADAPTER, (hashes or {}).get(LONG_ROPE_ADAPTER))
                self._adapters.load(str(folder / LONG_ROPE_ADAPTER), LONG_ROPE_ADAPTER)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """None: og does not expose its session."""
        return ()

    @property
    def speculation(self) -> str:
        return "off: onnxruntime-genai does not verify guesses"

    def require_open(self) -> None:
        """Raises EngineError once the model is closed."""
        if self._model is None:
            raise EngineError("this model is closed", remedy="Load the bundle again with `edgephi.load`")

    def sequence(
        self, capacity: int, *, scope: str | None = None, speculate: bool = False, adapter: Adapter | None = None
    ) -> OgSequence:
        """An empty sequence whose KV cache holds `capacity` tokens.

        Raises:
            EngineError: the model is closed, an adapter is given, or there is no memory for the cache.
        """
        if adapter is not None:
            raise cannot(TITLE, "adapt")
        engine = OgSequence(
            lambda long: self._generator(capacity, long),
            capacity,
            self._vocabulary,
            self._rope_switch,
            whole_prompts=self._whole_prompts,
        )
        self._sequences.add(engine)
        return engine

    def restore(
        self, file: Path, capacity: int, *, scope: str | None = None, adapter: Adapter | None = None
    ) -> OgSequence:
        """Raises EngineError: og gives nobody its cache."""
        raise cannot(TITLE, "save")

    def _generator(self, capacity: int, long: bool) -> Any:
        import onnxruntime_genai as og

        self.require_open()
        with library_errors(
            "onnxruntime-genai",
            where=f"KV cache of {capacity:,} tokens",
            remedy="Ask for fewer tokens, or close other programs",
        ):
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=capacity, do_sample=False, num_beams=1)
            generator = og.Generator(self._model, params)
            if long:
                generator.set_active_adapter(self._adapters, LONG_ROPE_ADAPTER)
        return generator

    def close(self) -> None:
        """Free the sequences, then the weights, and return the memory to the system."""
        for engine in list(self._sequences):
            engine.close()
        self._adapters = None
        self._model = None
        return_freed_memory()


class OgSequence:
    """One og generator at a time (the `KvSequence` protocol). Made by `OgEngine.sequence`.

    Args:
        new_generator: makes an empty one, for the short rope or (True) the long one.
        rope_switch: longest sequence that takes the short rope; None: the model has one rope.
        whole_prompts: the provider computes several tokens only behind an empty cache, and takes the cache for empty
            when it is given several (DirectML; DmlOperatorGroupQueryAttention.cpp).
    """

    def __init__(
        self,
        new_generator: Callable[[bool], Any],
        capacity: int,
        vocabulary: int,
        rope_switch: int | None = None,
        *,
        whole_prompts: bool = False,
    ) -> None:
        self._new_generator = new_generator
        self._generator = new_generator(False)
        self._vocabulary = vocabulary
        self._rope_switch = rope_switch
        self._whole_prompts = whole_prompts
        self._long = False
        self._recomputed = 0
        self._pending: int | None = None
        self._tokens: list[int] = []
        self.capacity = capacity

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def recomputed(self) -> int:
        return self._recomputed

    @property
    def guesses(self) -> tuple[int, int]:
        return 0, 0

    def prefill(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        require_in_vocabulary(tokens, self._vocabulary)
        new = [*(() if self._pending is None else (self._pending,)), *tokens]
        length = len(self._tokens) + len(new)
        if self._is_long(length) != self._long:
            self._recomputed += len(self._tokens)
            new = [*self._tokens, *new]
            self._change_rope()
        step = PREFILL_CHUNK
        if self._whole_prompts:
            step = 1 if self._tokens else max(1, len(new))
        for start in range(0, len(new), step):
            if cancelled():
                return False
            self._append(new[start : start + step])
        return True

    def step(self, choose: Chooser) -> int:
        if self._pending is not None:
            self.prefill((), lambda: False)
        with library_errors("onnxruntime-genai", where="decode", remedy="Load the model again"):
            logits = self._open().get_logits()
        self._pending = choose(logits[0, -1])
        return self._pending

    def rewind(self, length: int) -> None:
        self._pending = None
        with library_errors("onnxruntime-genai", where="KV cache", remedy="Load the model again"):
            self._open().rewind_to(length)
        del self._tokens[length:]

    def reuse(self, prompt: Sequence[int]) -> int:
        # the last token is always computed: its logits choose what follows
        common = 0 if self._whole_prompts else min(common_prefix(self._tokens, prompt), len(prompt) - 1)
        self._recomputed = 0
        if self._is_long(len(prompt)) == self._long:
            self.rewind(common)
        else:
            self._recomputed = common
            self._change_rope()
        return len(self._tokens)

    def fork(self, *, speculate: bool = False) -> OgSequence:
        raise cannot(TITLE, "fork")

    def save(self, file: Path) -> None:
        raise cannot(TITLE, "save")

    def pin(self) -> Callable[[], None]:
        raise cannot(TITLE, "share")

    def interrupt(self) -> None:
        """A cancel is heard between two pieces of a prompt."""

    def close(self) -> None:
        self._generator = None
        self._pending = None
        self._tokens = []

    def _change_rope(self) -> None:
        """Empty the cache: the rope of one sequence cannot change."""
        self._open()
        self._generator = self._pending = None  # two caches at once could be too much
        self._tokens = []
        self._generator = self._new_generator(not self._long)
        self._long = not self._long

    def _append(self, tokens: list[int]) -> None:
        with library_errors("onnxruntime-genai", where="prefill or decode", remedy="Load the model again"):
            self._open().append_tokens(np.asarray(tokens, dtype=np.int32))
        self._pending = None
        self._tokens += tokens

    def _is_long(self, length: int) -> bool:
        return self._rope_switch is not None and length > self._rope_switch

    def _open(self) -> Any:
        if self._generator is None:
            raise EngineError("this answer's model was closed", remedy="Load the bundle again with `edgephi.load`")
        return self._generator
