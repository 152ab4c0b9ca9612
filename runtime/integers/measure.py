"""What a machine measures before it uses integer products: the magnitudes of activations, the loss, and the gain."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import LOGIT_ROWS
from edgephi.ort import open_session, session_options
from edgephi.runtime.integers.graph import Candidates, in_float, with_maxima, with_noise
from edgephi.runtime.integers.model_file import GraphFile, write_model
from edgephi.runtime.prepacked.proof import feeds_of

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PIECE = 256
"""Tokens that are computed at once: what the engine takes (`engines/onnx_sequence.py`)."""
PIECES = 4
"""For calibration, and as many others for the proof."""
EVERY = 4
"""One token of so many is compared: logits of a large vocabulary take 0.8 MB each."""
ROUNDS = 5


@dataclass(frozen=True)
class Reference:
    """What an integer graph is compared with. Divergences are means over tokens of Kullback and Leibler's, in nats."""

    pieces: Sequence[Sequence[int]]
    log_probabilities: Sequence[NDArray[np.float32]]
    """Of the bundle's weights with activations in float, for each piece [tokens / EVERY, vocabulary]."""
    blocks: float
    """Divergence of the bundle's own graph from them."""

    def divergence(self, session: InferenceSession) -> float:
        """Of another graph from them."""
        return _divergence(self.log_probabilities, session, self.pieces)


def pieces_of(tokens: Sequence[int], context_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Pieces to calibrate with, and to compare with; a text that is too short is read again."""
    length = min(PIECE, context_length)
    wanted = 2 * PIECES * length
    repeated = (list(tokens) * -(-wanted // len(tokens)))[:wanted]
    pieces = [repeated[start : start + length] for start in range(0, wanted, length)]
    return pieces[0::2], pieces[1::2]


def largest_activations(
    model: GraphFile, found: Candidates, folder: Path, pieces: Sequence[Sequence[int]]
) -> dict[str, NDArray[np.float32]]:
    """Largest magnitude in every channel of what the integer products read, by the value's name.

    Args:
        model: the bundle's graph; it is changed.
        folder: where its data file lies.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """
    names = with_maxima(model, found.values)
    model.outputs = model.outputs[-len(names) :]
    model.prune()
    session = _open(write_model(model), folder)
    runs = [session.run(names, feeds_of(session, piece)) for piece in pieces]
    return {value: reduce(np.maximum, (run[index] for run in runs)) for index, value in enumerate(found.values)}


def measure_reference(model: GraphFile, folder: Path, pieces: Sequence[Sequence[int]]) -> Reference:
    """Run pieces through a bundle's graph, with activations in float and as it is.

    In memory: one of the two graphs at a time, and the log probabilities, 50 MB for each piece of a vocabulary of 200k.

    Args:
        model: the bundle's graph; it is changed.
        folder: where its data file lies.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """
    stored = write_model(model)
    in_float(model)
    exact = _open(write_model(model), folder)
    references = [_log_probabilities(exact, piece) for piece in pieces]
    del exact
    return Reference(pieces, references, _divergence(references, _open(stored, folder), pieces))


def noisiest(
    model: GraphFile, folder: Path, values: Collection[str], pieces: Sequence[Sequence[int]], share: float
) -> set[str] | None:
    """The fewest of the values that integer products read which together make a share of all noise; None: more than
    half of them.

    What rounding adds to the rows of each is measured. That divergence grows with the sum is taken for granted, and
    measured again by whoever leaves these out.

    Args:
        model: an integer graph; it is changed.
        folder: where its data file lies.
        share: of the noise, to be left out; more than 1: it cannot be.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """
    names = with_noise(model, values)
    session = _open(write_model(model), folder)
    runs = np.array([session.run(names, feeds_of(session, piece)) for piece in pieces], np.float64)
    found: NDArray[np.float64] = runs.mean(axis=0)
    noise = dict(zip(values, found.tolist(), strict=True))
    wanted, left = share * sum(noise.values()), set[str]()
    for value in sorted(noise, key=noise.__getitem__, reverse=True):
        if sum(noise[one] for one in left) >= wanted:
            break
        left.add(value)
    return left if len(left) <= len(noise) / 2 else None


def measure_gain(
    model: GraphFile,
    folder: Path,
    integers: InferenceSession,
    piece: Sequence[int],
    threads: int,
    *,
    kleidiai: bool = True,
) -> float:
    """How many times as fast a piece of a prompt is computed; the fastest of runs that take turns, which other
    programs disturb least.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """
    blocks = _open(write_model(model), folder, threads, kleidiai=kleidiai)
    seconds: dict[str, list[float]] = {"blocks": [], "integers": []}
    for _ in range(ROUNDS):
        for name, session in (("blocks", blocks), ("integers", integers)):
            feeds = feeds_of(session, piece)
            started = perf_counter()
            session.run(["logits"], feeds)
            seconds[name].append(perf_counter() - started)
    return float(min(seconds["blocks"]) / min(seconds["integers"]))


def _open(model: bytes, folder: Path, threads: int | None = None, *, kleidiai: bool = True) -> InferenceSession:
    options = session_options(threads=threads, kleidiai=kleidiai, data_folder=folder)
    return open_session(model, options, where=folder, remedy="Check the bundle with `edgephi verify`")


def _divergence(
    references: Sequence[NDArray[np.float32]], session: InferenceSession, pieces: Sequence[Sequence[int]]
) -> float:
    """Mean over tokens, in nats."""
    found = []
    for reference, piece in zip(references, pieces, strict=True):
        difference = reference - _log_probabilities(session, piece)
        found.append(np.einsum("tv,tv->t", np.exp(reference), difference, dtype=np.float64))
    return float(np.concatenate(found).mean())


def _log_probabilities(session: InferenceSession, piece: Sequence[int]) -> NDArray[np.float32]:
    """[tokens / EVERY, vocabulary]"""
    feeds: dict[str, Any] = feeds_of(session, piece)
    first = min(EVERY, len(piece)) - 1
    feeds[LOGIT_ROWS] = np.arange(first, len(piece), EVERY, dtype=np.int64)
    logits: NDArray[np.float32] = session.run(["logits"], feeds)[0][0].astype(np.float32)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits
