"""LoRA adapters of a loaded model: small updates of its weights, one or none for each answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgephi.adapter_file import read_adapter, require_fitting, require_lora
from edgephi.arguments import require_path, require_text, wrong
from edgephi.bundle import Manifest
from edgephi.errors import AdapterError, UsageError
from edgephi.files import refuse_path
from edgephi.runtime.engines import engines_that

if TYPE_CHECKING:
    from edgephi.runtime.engines.base import Abilities


def _require_name(name: object) -> None:
    require_text("the adapter's name", name, "a text")
    if not name:
        raise UsageError("an adapter's name is empty", remedy="Give it one")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that was compared with the bundle. Each is another, whatever is in it."""

    name: str
    sha256: str
    """Of the file: what was computed with one adapter is never taken for another's."""
    tensors: Mapping[str, NDArray[Any]]
    """A [inputs, rank] and B [rank, outputs] by the names of the graph's inputs; those it lacks are of rank 0."""


def load_adapter(name: str, file: str | os.PathLike[str], manifest: Manifest) -> Adapter:
    """Read an adapter for a bundle.

    Raises:
        AdapterError: the file cannot be used, or not with this bundle; it says why.
        UsageError: a name that is no text or empty, or no path.
    """
    _require_name(name)
    require_path("the adapter's file", file)
    refuse_path(AdapterError, file)
    path = Path(file)
    require_lora(manifest.lora, path)
    graph = manifest.graph_for("cpu")
    dtype = (graph.computes_in if graph else None) or "float32"
    read = read_adapter(path)
    require_fitting(read, manifest.lora, manifest.model.layers, dtype, path)
    # copies: views of the file may lie at any address
    return Adapter(name, read.sha256, {key: np.array(values) for key, values in read.tensors.items()})


def load_adapters(files: Mapping[str, str | os.PathLike[str]] | None, manifest: Manifest) -> dict[str, Adapter]:
    """The adapters that `edgephi.load` is given; errors as `load_adapter`."""
    if files is None:
        return {}
    if not isinstance(files, Mapping):
        raise wrong("adapters", files, "a dictionary of names and files")
    return {name: load_adapter(name, file, manifest) for name, file in files.items()}


class Adapters:
    """Those of one model, by name.

    Args:
        abilities: of the model's engine.
        given: at the load.

    Raises:
        AdapterError: some are given, and the engine takes none.
    """

    def __init__(self, manifest: Manifest, abilities: Abilities, given: Mapping[str, Adapter]) -> None:
        self._manifest, self._able, self._loaded = manifest, abilities.adapt, dict(given)
        self._lock = threading.Lock()
        if given:
            self._require_able()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def add(self, name: str, file: str | os.PathLike[str]) -> None:
        _require_name(name)
        self._require_able()
        self._require_new(name)
        loaded = load_adapter(name, file, self._manifest)
        with self._lock:
            self._require_new(name)
            self._loaded[name] = loaded

    def remove(self, name: str) -> None:
        _require_name(name)
        self.get(name)
        self._loaded.pop(name, None)

    def get(self, name: str | None) -> Adapter | None:
        """Raises UsageError: there is none of this name."""
        if name is None:
            return None
        if not isinstance(name, str) or name not in self._loaded:
            known = ", ".join(self._loaded) or "those that `edgephi.load(adapters=...)` was given: none"
            raise UsageError(f"there is no adapter {str(name)[:100]!r}", remedy=f"Choose from {known}")
        return self._loaded[name]

    def _require_new(self, name: str) -> None:
        if name in self._loaded:
            raise UsageError(
                f"there is an adapter {name[:100]!r} already", remedy="Remove it first, or choose another name"
            )

    def _require_able(self) -> None:
        if not self._able:
            raise AdapterError(
                "the engine that runs this model takes no adapters",
                remedy=f"Load the bundle with device='cpu': {' and '.join(engines_that('adapt'))} takes them",
            )


class TakesAdapters:
    """The part of `Model` that manages adapters."""

    _adapters: Adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that answers can take."""
        return self._adapters.names

    def find_adapter(self, name: str | None) -> Adapter | None:
        """The adapter of a name, for sequences (`open_sequence`); None has none.

        Raises:
            UsageError: there is none of this name.
        """
        return self._adapters.get(name)

    def add_adapter(self, name: str, file: str | os.PathLike[str]) -> None:
        """Load an adapter that `edgephi adapter convert` wrote.

        Raises:
            AdapterError: the file is damaged, of another base or other shapes, of a larger rank than the bundle was
                exported for, or the bundle or the engine takes none.
            UsageError: there is one of this name.
        """
        self._adapters.add(name, file)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; answers and sessions that have begun with it keep it.

        Raises:
            UsageError: there is none of this name.
        """
        self._adapters.remove(name)
