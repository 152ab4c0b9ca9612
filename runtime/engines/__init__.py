"""What computes a bundle's graphs: engines, each a module that `runtime/engines/base.py` describes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

from edgephi.errors import EngineError, UsageError

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
    owns_cache: bool = False
    """It runs graphs that write the KV cache where they read it, and no others."""
    about: str = ""
    """What it is and runs, for the help of `--engine`, behind the name."""

    @property
    def name(self) -> str:
        """What `edgephi.load(engine=...)` calls it."""
        return self.module.rpartition(".")[2]

    def runs(self, provider: str, shared_cache: bool) -> bool:
        """Whether it runs a bundle there; `shared_cache` says where its graphs write the KV cache."""
        return (self.providers is None or provider in self.providers) and (shared_cache or not self.owns_cache)

    def load(self) -> EngineModule:
        return cast("EngineModule", import_module(self.module))


# the first that runs a bundle on its provider is taken
ENGINES = (
    EngineEntry("edgephi.runtime.engines.npu", "the NPU's engine", ("qnn",), about="graphs compiled for an NPU"),
    EngineEntry(
        "edgephi.runtime.engines.onnx",
        "the CPU's engine",
        ("cpu",),
        owns_cache=True,
        about="plain onnxruntime with a KV cache of its own, for the CPU",
    ),
    EngineEntry(
        "edgephi.runtime.engines.genai",
        "onnxruntime-genai",
        None,
        about="onnxruntime-genai, for GPUs and for decoders that optimum traced",
    ),
)


def engine_for(provider: str, *, shared_cache: bool = True, asked: str | None = None) -> EngineEntry:
    """The engine that runs a bundle on an execution provider, by its short name.

    Args:
        shared_cache: its graphs write the KV cache where they read it.
        asked: name of the one to take.

    Raises:
        EngineError: the one that was asked for does not run it.
    """
    able = [entry for entry in ENGINES if entry.runs(provider, shared_cache)]
    if asked is None:
        return able[0]
    for entry in able:
        if entry.name == asked:
            return entry
    raise EngineError(
        f"the engine {asked} does not run this bundle on {provider}",
        remedy="Choose " + " or ".join(entry.name for entry in able),
    )


def require_engine(name: str | None) -> None:
    """Raises UsageError unless it is the name of an engine, or None."""
    names = [entry.name for entry in ENGINES]
    if name is not None and name not in names:
        raise UsageError(f"there is no engine {name!r}", remedy=f"Choose from {', '.join(names)}")


def engines_that(verb: Verb) -> list[str]:
    """Titles of the engines that have an ability."""
    return [entry.title for entry in ENGINES if getattr(entry.load().ABILITIES, verb)]
