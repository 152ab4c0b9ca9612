"""Weights in the order this processor's kernels read them, written once and mapped from the user's cache afterwards.

onnxruntime packs the constants of its CPU kernels at every load, into private memory. It can also write the packed
graph to disk (`session.save_external_prepacked_constant_initializers`, onnxruntime_session_options_config_keys.h); such
a folder loads faster, and its weights are pages of a file, which the system shares between processes and may drop.

Writing takes as long as seven to twenty of these loads save, and about twice the bundle's weights in disk space. So the
second load of a bundle within 30 days writes; who loads once pays nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from edgephi.bundle import Manifest
from edgephi.devices.cache import cache_folder
from edgephi.devices.memory import return_freed_memory
from edgephi.errors import OutputError, UsageError, library_errors
from edgephi.ort import open_session, session_options
from edgephi.runtime.prepacked.entries import age, discard, entry_key, is_usable, require_space, write_entry
from edgephi.runtime.prepacked.proof import same_answers

Prepacking = Literal["auto", "now", "never"]

SWITCH = "EDGEPHI_PREPACKED"
"""Environment variable that takes the place of 'auto' where the caller chose nothing."""
GRAPH, WEIGHTS = "model.onnx", "weights.bin"
FILES = frozenset((GRAPH, WEIGHTS))
"""Of an entry."""
SEEN, UNSOUND = ".seen", ".unsound"
"""Endings of the marks beside entries: this bundle was loaded before; its packed weights compute something else."""
REMEMBERED_S = 30 * 86_400
"""How long a mark counts."""
DIFFERS = "the packed weights of this model do not compute what its own do, so the bundle is used as it is"


@dataclass(frozen=True)
class Prepacked:
    """What became of it at a load."""

    folder: Path | None
    """What onnxruntime-genai loads instead of the bundle; None: the bundle itself."""
    why: str


def prepacking(asked: Prepacking | None) -> Prepacking:
    """What to do: the argument, or EDGEPHI_PREPACKED, or auto.

    Raises:
        UsageError: neither is one of the three words.
    """
    chosen = asked if asked is not None else os.environ.get(SWITCH) or "auto"
    if not isinstance(chosen, str) or chosen not in get_args(Prepacking):
        raise UsageError(
            f"prepacked is {chosen!r}", where=SWITCH if asked is None else None, remedy="Choose auto, now or never"
        )
    return chosen  # type: ignore[return-value]  # one of the words


def prepack(
    folder: Path,
    manifest: Manifest,
    graph: str,
    mode: Prepacking,
    *,
    every_byte: bool = False,
    kleidiai: bool = True,
) -> Prepacked:
    """Find a bundle's CPU graph in prepacked form, or write it.

    An entry is used after its small files were hashed and its weights have the size and the times of change that were
    recorded; weights whose times differ are hashed. One that fails is thrown away and written again. It stands for this
    bundle when the bundle's weights, by place and times or by their hash, are those it was made of.

    Args:
        folder: a bundle that was checked.
        mode: `auto` writes at the second load, `now` at once; `never` does not look.
        every_byte: hash the entry's weights whatever their times say; the bundle's were hashed by the caller.
        kleidiai: whether the kernels that read them may be KleidiAI's, which have an order of their own.

    Raises:
        BundleError: the bundle's weights are not those of its manifest.
        OutputError: mode is `now`, and the cache cannot be written.
        EngineError: onnxruntime refuses the graph.
    """
    if mode == "never":
        return Prepacked(None, "not wanted")
    if manifest.recipe.precision not in ("int4", "int8"):
        return Prepacked(None, "float weights are used as they are")
    try:
        root = cache_folder() / "prepacked"
        entry = root / entry_key(manifest, graph, kleidiai=kleidiai)
        is_there = os.path.lexists(entry)
    except (OutputError, OSError) as error:  # a user without a home, or a cache that is closed to him
        if mode == "now":
            raise
        return Prepacked(None, f"there is no cache: {error}")
    if is_there:
        if is_usable(folder, manifest, entry, every_byte=every_byte, files=FILES):
            return Prepacked(entry, "found in the cache")
        if not discard(entry):
            return Prepacked(None, "the cache's copy is damaged and in use")
    elif mode == "auto" and os.path.lexists(entry.with_suffix(UNSOUND)):
        return Prepacked(None, DIFFERS)
    elif mode == "auto" and not _seen_before(entry):
        return Prepacked(None, "the first load; the second one writes it")
    try:
        require_space(root, manifest)
        write = partial(pack, kleidiai=kleidiai)
        if not write_entry(folder, manifest, graph, entry, write, every_byte=every_byte, files=FILES):
            entry.with_suffix(UNSOUND).touch()
            if mode == "now":
                raise OutputError(DIFFERS, where=folder / graph, remedy="Load the bundle without `prepacked`")
            return Prepacked(None, DIFFERS)
    except OSError as error:
        if mode == "now":
            raise OutputError(
                f"the prepacked weights could not be written: {error.strerror or error}",
                where=root,
                remedy="Free disk space, or name another folder with EDGEPHI_CACHE",
            ) from error
        return Prepacked(None, f"the cache cannot be written: {error.strerror or error}")
    return Prepacked(entry, "written by this load")


def _seen_before(entry: Path) -> bool:
    """Whether this bundle was loaded before, lately; it is from now on."""
    mark = entry.with_suffix(SEEN)
    seen = age(mark) < REMEMBERED_S
    with suppress(OSError):  # a home that cannot be written has no second load
        entry.parent.mkdir(parents=True, exist_ok=True)
        for kind in (SEEN, UNSOUND):
            for old in entry.parent.glob(f"*{kind}"):
                if age(old) >= REMEMBERED_S:
                    old.unlink(missing_ok=True)
        mark.touch()
    return seen


def pack(graph: Path, target: Path, *, kleidiai: bool) -> bool:
    """Let onnxruntime optimize a graph, pack its constants and write both; whether these compute the same."""
    options = session_options(kleidiai=kleidiai, save_packed=(target / GRAPH, WEIGHTS))
    remedy = f"Check the bundle with `edgephi verify`, and the space in {target.parent}"
    try:
        plain = open_session(graph, options, where=graph, remedy=remedy)
        done = session_options(kleidiai=kleidiai, optimizations="none")
        packed = open_session(target / GRAPH, done, where=graph, remedy=remedy)
        with library_errors("onnxruntime", where=graph, remedy=remedy):
            return same_answers(plain, packed)
    finally:
        plain = packed = None
        return_freed_memory()  # as much as two plain loads would hold


def prepacked_files(found: Prepacked) -> Sequence[Path]:
    """The files a load from the cache reads; none where the bundle itself is loaded."""
    return [] if found.folder is None else [found.folder / name for name in sorted(FILES)]
