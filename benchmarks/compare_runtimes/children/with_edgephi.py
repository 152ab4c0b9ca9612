"""edgephi as its users run it: `edgephi.load`, and the engine behind its sessions.

Settings: folder, threads, prefill (optional: `integers`, made by the first load that asks for them), prepacked
(optional). Logits of every position come from the graph that computes prompts, by plain onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai  # noqa: F401  # what loading imports is not loading
import tokenizers  # noqa: F401
from numpy.typing import NDArray

from edgephi.benchmarks.evaluate.graph_logits import GraphLogits
from edgephi.bundle import LOGIT_ROWS
from edgephi.ort import open_session, session_options
from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.loading import load
from edgephi.runtime.prepacked.packing import GRAPH
from edgephi.runtime.prepacked.proof import feeds_of
from edgephi.runtime.sampling import Sampling, chooser

LIBRARIES = ("edgephi", "onnxruntime-genai", "onnxruntime")
Logits = Callable[[NDArray[np.int64]], NDArray[np.floating[Any]]]


def open_model(settings: dict[str, Any]) -> _Model:
    """Load a bundle."""
    return _Model(settings)


class _Model:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._folder = Path(settings["folder"])
        self._model = load(
            self._folder,
            threads=settings["threads"],
            prefill=settings.get("prefill", "blocks"),
            prepacked=settings.get("prepacked"),
        )
        self._choose = chooser(Sampling())
        self._sequence: KvSequence | None = None
        self._graph: Logits | None = None

    def start(self, capacity: int) -> None:
        if self._sequence is not None:
            self._sequence.close()
        self._sequence = self._model.open_sequence(capacity)

    def generate(self, ids: Sequence[int], count: int, on_token: Callable[[int], None]) -> None:
        assert self._sequence is not None
        self._sequence.prefill(ids, lambda: False)
        for _ in range(count):
            on_token(self._sequence.step(self._choose))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._graph = self._graph or self._open_graph(len(ids))
        return self._graph(np.asarray(ids, dtype=np.int64)).astype(np.float32)

    def _open_graph(self, length: int) -> Logits:
        entry = self._model.prefill.folder
        if entry is None:
            return GraphLogits(self._folder, length).logits
        options = session_options(kleidiai=False, optimizations="none")
        session = open_session(entry / GRAPH, options, where=entry, remedy="Make the integers again")

        def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            feeds = {**feeds_of(session, [int(token) for token in ids]), LOGIT_ROWS: np.arange(len(ids))}
            result: NDArray[np.float32] = session.run(["logits"], feeds)[0][0]
            return result

        return logits
