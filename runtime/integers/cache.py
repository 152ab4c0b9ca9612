"""The integer graph of a bundle in the user's cache: found, or made and proved.

Making it reads all weights, runs the model on a text of edgephi's own, and takes 10 to 20 seconds for SmolLM2. It
changes what a model answers a little. So it is made when somebody asks for it, `load(..., prefill="integers")`, and
later loads use what is there.

An entry is one of `runtime/prepacked/entries.py`: the graph and its packed weights, whose bytes and whose
bundle are checked in the same way; beside them lies what was measured, which is checked too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from edgephi.bundle import Manifest, read_unchanged
from edgephi.devices.cache import cache_folder
from edgephi.devices.memory import available_bytes
from edgephi.errors import EngineError, OutputError, library_errors
from edgephi.ort import open_session, session_options
from edgephi.records import Finite, Strict
from edgephi.runtime.integers import PrefillChoice
from edgephi.runtime.integers.graph import candidates, write_integers
from edgephi.runtime.integers.measure import largest_activations, measure_gain, measure_loss, pieces_of
from edgephi.runtime.integers.model_file import read_model, write_model
from edgephi.runtime.prepacked.entries import (
    discard,
    entry_key,
    is_usable,
    read_small,
    recorded_hashes,
    require_space,
    write_entry,
)
from edgephi.runtime.prepacked.packing import FILES, GRAPH, WEIGHTS, pack
from edgephi.runtime.tokenizer import Tokenizer

FOLDER = "integers"
"""In the user's cache."""
MEASURED = "measured.json"
MEASURED_LIMIT = 2**12
WRITTEN = FILES | {MEASURED}
"""Files of an entry."""
MADE = 1
"""Changes when an entry of the same bundle would hold something else."""
MOST_LOSS = 0.01
"""Divergence beyond that of the bundle's own graph, in nats for each token."""
LEAST_GAIN = 1.1
FREE_FACTOR = 0.6
"""Times the entry's bytes that have to be free where nobody asked for integers. onnxruntime writes the weights as they
were beside those that it packed; only these, about half of the file, are read."""
MAKING_FACTOR = 3
"""Times the bundle's bytes that making takes: both graphs are loaded to be compared."""
FEWEST_KINDS = 16
"""Different tokens of a text that says something of a model."""
BLOCKS = "Load the bundle with prefill='blocks'"


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


@dataclass(frozen=True)
class Prefill:
    """What computes the prompts of a loaded model."""

    by: Literal["blocks", "integers"]
    why: str
    folder: Path | None = None
    """Where the integer graph lies."""
    measured: Measured | None = None
    bytes: int = 0
    """Of its files, which are mapped."""

    @property
    def in_words(self) -> str:
        """For a person."""
        return f"{self.by}: {self.why}"


def find_or_make(
    folder: Path,
    manifest: Manifest,
    graph: str | None,
    asked: PrefillChoice,
    *,
    threads: int,
    every_byte: bool = False,
    kleidiai: bool = True,
) -> Prefill:
    """What computes a bundle's prompts on the CPU.

    Args:
        folder: a bundle that was checked.
        graph: its graph whose rows of logits can be chosen; None: it has none.
        asked: `integers` makes them where there are none; `auto` takes what is there, if there is memory for it.
        threads: of an operator, for the measurement.
        every_byte: hash an entry's weights whatever their times say; the bundle's were hashed by the caller.
        kleidiai: whether kernels of KleidiAI may compute what stays in blocks; see `devices/kleidiai.py`.

    Raises:
        BundleError: the bundle's weights are not those of its manifest.
        EngineError: integers are asked for, and this bundle or this machine gains nothing, or loses too much by them.
        OutputError: the cache cannot be written.
    """
    if asked == "blocks":
        return Prefill("blocks", "as asked for")
    why_not = _why_not(manifest, graph)
    if why_not is not None or graph is None:
        if asked == "integers":
            raise EngineError(f"prompts cannot be computed by integers: {why_not}", where=folder, remedy=BLOCKS)
        return Prefill("blocks", why_not or "")
    try:
        root = cache_folder() / FOLDER
        entry = root / entry_key(manifest, graph, kleidiai=kleidiai, integers=MADE)
        is_there = os.path.lexists(entry)
    except (OutputError, OSError) as error:  # a user without a home, or a cache that is closed to him
        if asked == "integers":
            raise
        return Prefill("blocks", f"there is no cache: {error}")
    if is_there:
        if is_usable(folder, manifest, entry, every_byte=every_byte, files=WRITTEN):
            measured = _measured(entry)
            if measured is not None:
                return _found(entry, measured, asked)
        if not discard(entry):
            if asked == "auto":
                return Prefill("blocks", "the cache's integers are damaged, and cannot be removed")
            raise OutputError(
                "the cache's integer weights are damaged, and cannot be removed",
                where=entry,
                remedy="Close programs that use them, or remove the folder yourself",
            )
    if asked == "auto":
        what = "damaged, and removed" if is_there else "not made on this machine"
        return Prefill("blocks", f"integers were {what}; prefill='integers' makes them")
    needed = MAKING_FACTOR * manifest.stored_bytes
    if available_bytes() < needed:
        raise EngineError(
            f"making integers takes {needed / 1e9:.1f} GB of memory, and less is free",
            where=folder,
            remedy="Close other programs, or load the bundle with prefill='blocks'",
        )
    try:
        require_space(root, manifest)
        write_entry(
            folder,
            manifest,
            graph,
            entry,
            lambda source, target: _make(folder, manifest, source, target, threads, kleidiai=kleidiai),
            every_byte=every_byte,
            files=WRITTEN,
        )
        measured = _measured(entry)
        if measured is None:
            raise OSError("another process removed them")
        return _found(entry, measured, asked)
    except OSError as error:
        raise _not_written(error, root) from error


def _not_written(error: OSError, root: Path) -> OutputError:
    return OutputError(
        f"the integer weights could not be written: {error.strerror or error}",
        where=root,
        remedy="Free disk space, or name another folder with EDGEPHI_CACHE",
    )


def entry_digest(folder: Path) -> str:
    """What tells the integers of one entry from those of another: the hashes of graph and weights in its record.

    Raises:
        EngineError: the entry was removed since it was found.
    """
    import hashlib
    import json

    hashes = recorded_hashes(folder)
    return hashlib.sha256(json.dumps({name: hashes.get(name) for name in sorted(FILES)}).encode()).hexdigest()


def _why_not(manifest: Manifest, graph: str | None) -> str | None:
    if graph is None:
        return "the bundle's graph computes no rows of logits by choice; export the model again"
    if manifest.recipe.precision not in ("int4", "int8"):
        return "its weights are floats"
    if manifest.recipe.accuracy_level in (0, 1):
        return "its products are to be computed in float"
    return None


def _found(entry: Path, measured: Measured, asked: PrefillChoice) -> Prefill:
    size = sum((entry / name).stat().st_size for name in (GRAPH, WEIGHTS))
    if asked == "auto" and available_bytes() < FREE_FACTOR * size:
        return Prefill("blocks", f"integers would need {size / 1e9:.1f} GB of memory, and less is free")
    why = (
        f"{measured.gain:.1f} times as fast as blocks when they were made here, divergence "
        f"{measured.loss_integers:.4f} where blocks have {measured.loss_blocks:.4f}, {size / 1e6:,.0f} MB mapped"
    )
    return Prefill("integers", why, entry, measured, size)


def _measured(entry: Path) -> Measured | None:
    try:
        return Measured.model_validate_json(read_small(entry / MEASURED, MEASURED_LIMIT))
    except (OSError, ValidationError):
        return None


def _make(folder: Path, manifest: Manifest, source: Path, target: Path, threads: int, *, kleidiai: bool) -> bool:
    """Write the integer graph, packed, and what was measured.

    Raises:
        EngineError: this bundle or this machine gains nothing, or loses too much.
        OutputError: the folder cannot be written.
    """
    refusal = "prompts cannot be computed by integers"
    digest = next(file.sha256 for file in manifest.files if file.path == source.name)
    stored = read_unchanged(source, digest)
    unpacked = target / "unpacked"
    unpacked.mkdir()
    with library_errors(refusal, where=source, remedy=BLOCKS):
        model = read_model(stored)
        data = np.memmap(_data_file(folder, manifest), np.uint8, "r")
        found = candidates(model, data)
        if not found.linears:
            raise EngineError(f"{refusal}: the graph has no linear layer that is known", where=source, remedy=BLOCKS)
        tokens = _tokens(folder, manifest.model.vocabulary_size)
        calibration, held_out = pieces_of(tokens, manifest.model.context_length)
        largest = largest_activations(read_model(stored), found, folder, calibration)
        try:
            with (unpacked / WEIGHTS).open("wb") as stream:
                write_integers(model, found, largest, data, WEIGHTS, stream)
            (unpacked / GRAPH).write_bytes(write_model(model))
        except OSError as error:
            raise _not_written(error, target.parent) from error
        packs_soundly = pack(unpacked / GRAPH, target, kleidiai=kleidiai)
        if not packs_soundly:
            raise EngineError(f"{refusal}: packed weights compute something else", where=source, remedy=BLOCKS)
        options = session_options(threads=threads, kleidiai=kleidiai, optimizations="none")
        integers = open_session(target / GRAPH, options, where=source, remedy=BLOCKS)
        loss = measure_loss(read_model(stored), folder, integers, held_out)
        gain = measure_gain(read_model(stored), folder, integers, held_out[0], threads, kleidiai=kleidiai)
        del integers, data
    for name in (WEIGHTS, GRAPH):
        (unpacked / name).unlink()
    unpacked.rmdir()
    if not (isfinite(loss.blocks) and loss.integers <= loss.blocks + MOST_LOSS):
        raise EngineError(
            f"{refusal}: the divergence from activations in float is {loss.integers:.4f}, "
            f"more than {MOST_LOSS} above the {loss.blocks:.4f} of blocks",
            where=source,
            remedy=BLOCKS,
        )
    if gain < LEAST_GAIN:
        raise EngineError(
            f"{refusal}: they are {gain:.2f} times as fast as blocks on this machine, less than {LEAST_GAIN}",
            where=source,
            remedy=BLOCKS,
        )
    measured = Measured(loss_blocks=loss.blocks, loss_integers=loss.integers, gain=gain, products=len(found.linears))
    (target / MEASURED).write_text(measured.model_dump_json(indent=2), encoding="utf-8", newline="\n")
    return True


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
