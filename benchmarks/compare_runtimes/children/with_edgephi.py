"""edgephi as its users run it: `edgephi.load`, and the engine behind its sessions.

Settings: folder, threads, prepacked (optional). Logits of every position come from the bundle's model.onnx, by plain
onnxruntime.
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
from edgephi.runtime.engines.base import KvSequence
from edgephi.runtime.model import load
from edgephi.runtime.sampling import Sampling, chooser

LIBRARIES = ("edgephi", "onnxruntime-genai", "onnxruntime")


def open_model(settings: dict[str, Any]) -> _Model:
    """Load a bundle."""
    return _Model(settings)


class _Model:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._folder = Path(settings["folder"])
        self._model = load(self._folder, threads=settings["threads"], prepacked=settings.get("prepacked"))
        self._choose = chooser(Sampling())
        self._sequence: KvSequence | None = None
        self._graph: GraphLogits | None = None

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
        self._graph = self._graph or GraphLogits(self._folder, len(ids))
        return self._graph.logits(np.asarray(ids, dtype=np.int64)).astype(np.float32)
