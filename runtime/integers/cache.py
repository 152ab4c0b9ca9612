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
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from edgephi.bundle import Manifest
from edgephi.devices.cache import cache_folder
from edgephi.devices.memory import available_bytes
from edgephi.errors import EngineError, OutputError
from edgephi.runtime.integers import PrefillChoice
from edgephi.runtime.integers.make import BLOCKS, MEASURED, REFUSAL, Measured, make, not_written
from edgephi.runtime.prepacked.entries import (
    discard,
    entry_key,
    is_usable,
    read_small,
    recorded_hashes,
    require_space,
    write_entry,
)
from edgephi.runtime.prepacked.packing import FILES, GRAPH, WEIGHTS

FOLDER = "integers"
"""In the user's cache."""
MEASURED_LIMIT = 2**12
WRITTEN = FILES | {MEASURED}
"""Files of an entry."""
MADE = 1
"""Changes when an entry of the same bundle would hold something else."""
FREE_FACTOR = 0.6
"""Times the entry's bytes that have to be free where nobody asked for integers. onnxruntime writes the weights as they
were beside those that it packed; only these, about half of the file, are read."""
MAKING_FACTOR = 3
"""Times the bundle's bytes that making takes: both graphs are loaded to be compared."""


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
            raise EngineError(f"{REFUSAL}: {why_not}", where=folder, remedy=BLOCKS)
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
            lambda source, target: make(folder, manifest, source, target, threads, kleidiai=kleidiai),
            every_byte=every_byte,
            files=WRITTEN,
        )
        measured = _measured(entry)
        if measured is None:
            raise OSError("another process removed them")
        return _found(entry, measured, asked)
    except OSError as error:
        raise not_written(error, root) from error


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
    if measured.left:
        every = measured.products + measured.left
        why += f"; {measured.left} of {every} products, whose inputs round most coarsely, stay in blocks"
    return Prefill("integers", why, entry, measured, size)


def _measured(entry: Path) -> Measured | None:
    try:
        return Measured.model_validate_json(read_small(entry / MEASURED, MEASURED_LIMIT))
    except (OSError, ValidationError):
        return None
