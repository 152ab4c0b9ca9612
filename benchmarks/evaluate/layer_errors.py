"""How far a bundle's hidden states are from the float model's, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks.evaluate.graph_logits import GraphLogits

if TYPE_CHECKING:
    from edgephi.export.spec import DecoderSpec

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

STATES_LIMIT = 256 * 2**20
"""Bytes of the bundle's hidden states that are kept until the float model has computed its own."""


class LayerErrors:
    """Compares the first of some sequences; one at least, and no more than fit `STATES_LIMIT`.

    Args:
        folder: the bundle.
        sequences: token ids int64 [n]; the bundle runs on them now.
        rotation_seed: as the manifest records it: the float model's states are rotated before they are compared.

    Raises:
        EngineError, BundleError, UsageError: see `GraphLogits`.
    """

    def __init__(self, folder: Path, sequences: Sequence[NDArray[np.int64]], rotation_seed: int | None = None) -> None:
        graph = GraphLogits(folder, max(map(len, sequences)), residuals=True)
        self._states: list[list[Float32]] = []
        left = STATES_LIMIT
        for ids in sequences:
            if not graph.residuals or (self._states and left < sum(states.nbytes for states in self._states[-1])):
                break
            self._states.append([states.astype(np.float32) for states in graph.hidden_states(ids)])
            left -= sum(states.nbytes for states in self._states[-1])
        self.ratios: tuple[list[Float64], ...] = tuple([] for _ in self._states)
        """Of every sequence that is compared, for each layer, a ratio for every token (`mean_errors`). Empty: the graph
        is another exporter's, whose hidden states nobody can name."""
        self._rotation_seed = rotation_seed

    @property
    def result(self) -> tuple[float, ...] | None:
        """`mean_errors` of what was compared so far."""
        return mean_errors(self.ratios)

    def compare(self, spec: DecoderSpec, layer: int, expected: Sequence[Float32]) -> None:
        """Take the float model's hidden states [n, hidden] of every sequence behind a layer; layers come in order."""
        from edgephi.export.weights.rotation import rotated_states

        if not self._states:
            return
        for ratios, states, found in zip(self.ratios, self._states, expected, strict=False):
            seed = self._rotation_seed
            theirs = found if seed is None else rotated_states(spec, seed, found)
            error = np.square(states[layer] - theirs).sum(axis=-1, dtype=np.float64)
            size = np.square(theirs).sum(axis=-1, dtype=np.float64)
            ratios.append(error / np.maximum(size, np.finfo(np.float32).tiny))


def mean_errors(ratios: Sequence[Sequence[Float64]]) -> tuple[float, ...] | None:
    """Of every layer, the squared error over the squared size of a token's hidden states, mean over tokens.

    One sum for all tokens would show little but the few whose activations are huge. None: there is nothing.

    Args:
        ratios: of every sequence, for each layer, of every token.
    """
    return tuple(float(np.concatenate(layer).mean()) for layer in zip(*ratios, strict=True)) or None


def windows_compared(layers: int, length: int, hidden_size: int) -> int:
    """Of windows of one length, how many `LayerErrors` compares: their states fit STATES_LIMIT, and one at least."""
    return max(1, STATES_LIMIT // (layers * length * hidden_size * np.dtype(np.float32).itemsize))
