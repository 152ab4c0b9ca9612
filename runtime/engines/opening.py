"""Opening the engine that runs a bundle where it was placed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgephi.runtime.engines import engine_for
from edgephi.runtime.engines.base import Engine, OpenRequest
from edgephi.runtime.prepacked.cache import Prepacked, Prepacking, prepack


@dataclass(frozen=True)
class OpenedEngine:
    """A loaded model, and what became of its packed weights on the way."""

    engine: Engine
    prepacked: Prepacked


def open_engine(request: OpenRequest, packing: Prepacking = "never", *, every_byte: bool = False) -> OpenedEngine:
    """Load a model with the engine for the provider it was placed on.

    Args:
        packing, every_byte: of the CPU's graph, as for `prepack`.

    Raises:
        BundleError: a file was changed since it was checked, or the bundle is not for this place.
        DeviceError: the device or its provider is missing.
        EngineError: the runtime refuses the graphs.
        OutputError: packing is `now`, and the cache cannot be written.
    """
    choice = request.place.choice
    module = engine_for(choice.provider, shared_cache=request.config.shares_cache, asked=request.engine).load()
    prepacked = Prepacked(None, "only the CPU provider packs weights")
    if choice.provider == "cpu" and choice.graph is not None:
        graph = module.graph_file(choice.graph)
        how = {"every_byte": every_byte, "kleidiai": choice.may_use_kleidiai}
        prepacked = prepack(request.folder, request.manifest, graph, packing, **how)
        request = replace(request, prepacked=prepacked.folder)
    return OpenedEngine(module.open_engine(request), prepacked)
