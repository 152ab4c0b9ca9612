"""Opening the engine that runs a bundle where it was placed, while the caller reads what else a model needs.

Creating the CPU's session takes about as long as reading a tokenizer, and neither waits for the other: onnxruntime
works without Python's lock. The other engines are opened in the caller's thread, because drivers may care.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace

from edgephi.errors import EngineError
from edgephi.runtime.engines import engine_for, engines_that
from edgephi.runtime.engines.base import Abilities, Engine, OpenRequest
from edgephi.runtime.integers import PrefillChoice
from edgephi.runtime.integers.cache import Prefill, find_or_make
from edgephi.runtime.prepacked.packing import Prepacked, Prepacking, prepack

BESIDE = "onnx"
"""Name of the engine that is opened in a thread of its own."""


class EngineOpening:
    """An engine on its way. Call `start`, then `result` once or `abandon`, at any time; after a result it closes it.

    Args:
        request: the bundle and where it runs.
        packing, every_byte: of the CPU's graph, as for `prepack`.
        prefill: what computes prompts, as for `load`.
    """

    prepacked: Prepacked
    """What became of the packed weights; known from `start` on."""
    prefill: Prefill
    """What computes prompts; known from `start` on."""

    def __init__(
        self,
        request: OpenRequest,
        packing: Prepacking = "never",
        prefill: PrefillChoice = "blocks",
        *,
        every_byte: bool = False,
    ) -> None:
        self._request, self._packing, self._prompts_by, self._every_byte = request, packing, prefill, every_byte
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._error: BaseException | None = None
        self._abandoned = False

    def start(self) -> None:
        """Find or write the packed weights; then begin to load the model, beside the caller where that is possible.

        Raises:
            BundleError: a file was changed since it was checked, or the bundle is not for this place.
            EngineError: the engine that was asked for does not run there, onnxruntime refuses the graph to pack, or
                prompts are to be computed by integers and cannot.
            OutputError: packing is `now` or integers are to be made, and the cache cannot be written.
        """
        request, choice = self._request, self._request.place.choice
        entry = engine_for(choice.provider, shared_cache=request.config.shares_cache, asked=request.engine)
        self._module = entry.load()
        self.prepacked = Prepacked(None, "only the CPU provider packs weights")
        if choice.provider == "cpu" and choice.graph is not None:
            graph = self._module.graph_file(choice.graph)
            how = {"every_byte": self._every_byte, "kleidiai": choice.may_use_kleidiai}
            self.prepacked = prepack(request.folder, request.manifest, graph, self._packing, **how)
            request = replace(request, prepacked=self.prepacked.folder)
        self.prefill = _prefill(request, self._module.ABILITIES, self._prompts_by, self._every_byte)
        self._request = replace(request, prompts=self.prefill.folder)
        if entry.name == BESIDE:
            import onnxruntime  # noqa: F401 - here, so that the thread has nothing to do for which it needs Python

            self._thread = threading.Thread(target=self._open, name="edgephi-open")
            try:
                self._thread.start()
            except RuntimeError:  # the system gives this user no more threads: `result` opens it
                self._thread = None

    def result(self) -> Engine:
        """The engine, when it is open.

        Raises:
            BundleError: a file was changed since it was checked, or the bundle is not for this place.
            DeviceError: the device or its provider is missing.
            EngineError: the runtime refuses the graphs.
        """
        if self._thread is None:
            self._open()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._engine is not None
        return self._engine

    def abandon(self) -> None:
        """Close the engine, as soon as it is open; its own thread does so where Ctrl-C ends the waiting for it."""
        self._abandoned = True
        if self._thread is not None:
            with suppress(RuntimeError):  # Ctrl-C struck before it began
                self._thread.join()
        if self._engine is not None:
            self._engine.close()

    def _open(self) -> None:
        try:
            self._engine = self._module.open_engine(self._request)
            if self._abandoned:
                self._engine.close()
        except BaseException as error:  # the caller's, who asks for the result
            self._error = error


def open_engine(request: OpenRequest) -> Engine:
    """Load a model with the engine for the provider it was placed on, without packed weights.

    Raises:
        EdgephiError: as `EngineOpening`.
    """
    opening = EngineOpening(request)
    opening.start()
    return opening.result()


def _prefill(request: OpenRequest, abilities: Abilities, asked: PrefillChoice, every_byte: bool) -> Prefill:
    entry = request.place.choice.graph
    if entry is not None and abilities.integers:
        return find_or_make(
            request.folder,
            request.manifest,
            entry.logit_rows,
            asked,
            threads=request.threads,
            every_byte=every_byte,
            kleidiai=request.place.choice.may_use_kleidiai,
        )
    if asked == "integers":
        able = " and ".join(engines_that("integers"))
        raise EngineError(
            f"prompts are computed by integers on the CPU only, by the engine {able}",
            where=request.folder,
            remedy="Load the bundle on the CPU, or leave prefill out",
        )
    return Prefill("blocks", "only the CPU's own engine computes prompts by integers")
