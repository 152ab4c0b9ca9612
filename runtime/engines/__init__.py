"""What computes a bundle's graphs: engines, each a module that `runtime/engines/base.py` describes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from edgephi.runtime.engines.base import EngineModule, Verb


@dataclass(frozen=True)
class EngineEntry:
    """An engine, by name until it is needed."""

    module: str
    title: str
    """As messages name it."""
    providers: tuple[str, ...] | None
    """Short names of the execution providers it runs; None: all that have a graph in a bundle."""

    def load(self) -> EngineModule:
        return cast("EngineModule", import_module(self.module))


# the first that runs a provider is taken for it
ENGINES = (
    EngineEntry("edgephi.runtime.engines.npu", "the NPU's engine", ("qnn",)),
    EngineEntry("edgephi.runtime.engines.genai", "onnxruntime-genai", None),
)


def engine_for(provider: str) -> EngineEntry:
    """The engine that runs an execution provider, by its short name."""
    return next(entry for entry in ENGINES if entry.providers is None or provider in entry.providers)


def engines_that(verb: Verb) -> list[str]:
    """Titles of the engines that have an ability."""
    return [entry.title for entry in ENGINES if getattr(entry.load().ABILITIES, verb)]
