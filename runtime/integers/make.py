"""Making the integer graph of a bundle: written, packed, and proved to lose little and to gain something.

If all products together lose too much, those whose inputs are rounded most coarsely stay in blocks, and the rest is
proved again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from edgephi.bundle import Manifest, read_unchanged
from edgephi.errors import EngineError, OutputError, library_errors
from edgephi.ort import open_session, session_options
from edgephi.records import Finite, Strict
from edgephi.runtime.integers.graph import Candidates, candidates, write_integers
from edgephi.runtime.integers.measure import (
    Reference,
    largest_activations,
    measure_gain,
    measure_reference,
    noisiest,
    pieces_of,
)
from edgephi.runtime.integers.model_file import GraphFile, read_model, write_model
from edgephi.runtime.prepacked.packing import GRAPH, WEIGHTS, pack
from edgephi.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

MEASURED = "measured.json"
MOST_LOSS = 0.01
"""Divergence beyond that of the bundle's own graph, in nats for each token."""
MARGIN = 0.9
"""Of that divergence, which is aimed at when products are left out."""
ATTEMPTS = 3
"""To make a graph that loses no more; each leaves more products in blocks."""
LEAST_GAIN = 1.1
FEWEST_KINDS = 16
"""Different tokens of a text that says something of a model."""
BLOCKS = "Load the bundle with prefill='blocks'"
REFUSAL = "prompts cannot be computed by integers"


class Measured(Strict):
    """measured.json: what was found on this machine when the entry was made."""

    loss_blocks: Finite
    """Kullback-Leibler divergence from the same weights with activations in float, nats for each token, of the
    bundle's graph."""
    loss_integers: Finite
    """The same of the integer graph."""
    gain: Finite = Field(ge=0)
    """How many times as fast a piece of a prompt is computed."""
    products: int = Field(ge=1)
    """Linear layers that are integer products."""
    left: int = Field(default=0, ge=0)
    """Linear layers that could be, and stay in blocks, because all of them would have lost too much."""


@dataclass(frozen=True)
class _Work:
    """What a graph is made of, and where."""

    folder: Path
    """The bundle's."""
    source: Path
    """The bundle's graph; `stored` are its bytes."""
    stored: bytes
    data: NDArray[np.uint8]
    largest: Mapping[str, NDArray[np.float32]]
    """Magnitudes by value and channel."""
    unpacked: Path
    target: Path
    threads: int
    kleidiai: bool


def make(folder: Path, manifest: Manifest, source: Path, target: Path, threads: int, *, kleidiai: bool) -> bool:
    """Write the integer graph, packed, and what was measured; returns True.

    Args:
        folder: of the bundle.
        source: its graph whose rows of logits can be chosen.
        target: an empty folder.
        threads: of an operator, for the measurement.
        kleidiai: see `devices/kleidiai.py`.

    Raises:
        EngineError: this bundle or this machine gains nothing, or loses too much.
        OutputError: the folder cannot be written.
    """
    digest = next(file.sha256 for file in manifest.files if file.path == source.name)
    stored = read_unchanged(source, digest)
    unpacked = target / "unpacked"
    unpacked.mkdir()
    with library_errors(REFUSAL, where=source, remedy=BLOCKS):
        data = np.memmap(_data_file(folder, manifest), np.uint8, "r")
        known = candidates(read_model(stored), data)
        if not known.linears:
            raise EngineError(f"{REFUSAL}: the graph has no linear layer that is known", where=source, remedy=BLOCKS)
        tokens = _tokens(folder, manifest.model.vocabulary_size)
        calibration, held_out = pieces_of(tokens, manifest.model.context_length)
        largest = largest_activations(read_model(stored), known, folder, calibration)
        work = _Work(folder, source, stored, data, largest, unpacked, target, threads, kleidiai)
        reference = measure_reference(read_model(stored), folder, held_out)
        integers, loss, products = _within_the_loss(work, calibration, reference)
        gain = measure_gain(read_model(stored), folder, integers, held_out[0], threads, kleidiai=kleidiai)
        del integers, data, work
    for name in (WEIGHTS, GRAPH):
        (unpacked / name).unlink()
    unpacked.rmdir()
    if gain < LEAST_GAIN:
        raise EngineError(
            f"{REFUSAL}: they are {gain:.2f} times as fast as blocks on this machine, less than {LEAST_GAIN}",
            where=source,
            remedy=BLOCKS,
        )
    left = len(known.linears) - products
    measured = Measured(loss_blocks=reference.blocks, loss_integers=loss, gain=gain, products=products, left=left)
    (target / MEASURED).write_text(measured.model_dump_json(indent=2), encoding="utf-8", newline="\n")
    return True


def not_written(error: OSError, root: Path) -> OutputError:
    """The error for what the system said when an entry was written."""
    return OutputError(
        f"the integer weights could not be written: {error.strerror or error}",
        where=root,
        remedy="Free disk space, or name another folder with EDGEPHI_CACHE",
    )


def _within_the_loss(
    work: _Work, calibration: Sequence[Sequence[int]], reference: Reference
) -> tuple[InferenceSession, float, int]:
    """The packed graph, its divergence, and how many integer products it has."""
    left = set[str]()
    for attempt in range(ATTEMPTS):
        model = read_model(work.stored)
        found = candidates(model, work.data).without(left)
        integers = _pack(work, model, found)
        loss = reference.divergence(integers)
        more = loss - reference.blocks
        if more <= MOST_LOSS and isfinite(reference.blocks):
            return integers, loss, len(found.linears)
        del integers  # Windows replaces no file that is mapped
        noisy = None
        if isfinite(more) and attempt < ATTEMPTS - 1:
            noisy = noisiest(model, work.unpacked, list(found.values), calibration, 1 - MARGIN * MOST_LOSS / more)
        if not noisy:
            break
        left |= noisy
        for name in (GRAPH, WEIGHTS):
            (work.target / name).unlink()
    raise EngineError(
        f"{REFUSAL}: the divergence from activations in float is {loss:.4f}, "
        f"more than {MOST_LOSS} above the {reference.blocks:.4f} of blocks",
        where=work.source,
        remedy=BLOCKS,
    )


def _pack(work: _Work, model: GraphFile, found: Candidates) -> InferenceSession:
    """Change a graph, write it and its packed form, and open this."""
    try:
        with (work.unpacked / WEIGHTS).open("wb") as stream:
            write_integers(model, found, work.largest, work.data, WEIGHTS, stream)
        (work.unpacked / GRAPH).write_bytes(write_model(model))
    except OSError as error:
        raise not_written(error, work.target.parent) from error
    if not pack(work.unpacked / GRAPH, work.target, kleidiai=work.kleidiai):
        raise EngineError(f"{REFUSAL}: packed weights compute something else", where=work.source, remedy=BLOCKS)
    options = session_options(threads=work.threads, kleidiai=work.kleidiai, optimizations="none")
    return open_session(work.target / GRAPH, options, where=work.source, remedy=BLOCKS)


def _data_file(folder: Path, manifest: Manifest) -> Path:
    return folder / next(file.path for file in manifest.files if file.path.endswith(".onnx.data"))


def _tokens(folder: Path, vocabulary: int) -> list[int]:
    """Of edgephi's own text, with which exports calibrate too; random ones where the tokenizer does not know it."""
    from importlib.resources import files

    text = files("edgephi").joinpath("sample_text.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer(folder)
    try:
        tokens = tokenizer.encode(text)
    finally:
        tokenizer.close()
    if len(set(tokens)) < FEWEST_KINDS:
        tokens = [int(token) for token in np.random.default_rng(0).integers(0, vocabulary, len(text))]
    return tokens
