"""Opening the engine that runs a bundle where it was placed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgephi.errors import EngineError
from edgephi.runtime.engines import engine_for, engines_that
from edgephi.runtime.engines.base import Abilities, Engine, OpenRequest
from edgephi.runtime.integers import PrefillChoice
from edgephi.runtime.integers.cache import Prefill, find_or_make
from edgephi.runtime.prepacked.cache import Prepacked, Prepacking, prepack


@dataclass(frozen=True)
class OpenedEngine:
    """A loaded model, what became of its packed weights on the way, and what computes its prompts."""

    engine: Engine
    prepacked: Prepacked
    prefill: Prefill


def open_engine(
    request: OpenRequest,
    packing: Prepacking = "never",
    prefill: PrefillChoice = "blocks",
    *,
    every_byte: bool = False,
) -> OpenedEngine:
    """Load a model with the engine for the provider it was placed on.

    Args:
        packing, every_byte: of the CPU's graph, as for `prepack`.
        prefill: what computes prompts, as for `load`.

    Raises:
        BundleError: a file was changed since it was checked, or the bundle is not for this place.
        DeviceError: the device or its provider is missing.
        EngineError: the runtime refuses the graphs, or prompts are to be computed by integers and cannot.
        OutputError: packing is `now` or integers are to be made, and the cache cannot be written.
    """
    choice = request.place.choice
    module = engine_for(choice.provider, shared_cache=request.config.shares_cache, asked=request.engine).load()
    prepacked = Prepacked(None, "only the CPU provider packs weights")
    if choice.provider == "cpu" and choice.graph is not None:
        graph = module.graph_file(choice.graph)
        how = {"every_byte": every_byte, "kleidiai": choice.may_use_kleidiai}
        prepacked = prepack(request.folder, request.manifest, graph, packing, **how)
        request = replace(request, prepacked=prepacked.folder)
    prompts = _prefill(request, module.ABILITIES, prefill, every_byte)
    return OpenedEngine(module.open_engine(replace(request, prompts=prompts.folder)), prepacked, prompts)


def _prefill(request: OpenRequest, abilities: Abilities, asked: PrefillChoice, every_byte: bool) -> Prefill:
    entry = request.place.choice.graph
    if entry is not None and abilities.integers:
        return find_or_make(
            request.folder,
            request.manifest,
            entry.logit_rows,
            asked,
            threads=request.threads,
            every_byte=every_byte,
            kleidiai=request.place.choice.may_use_kleidiai,
        )
    if asked == "integers":
        able = " and ".join(engines_that("integers"))
        raise EngineError(
            f"prompts are computed by integers on the CPU only, by the engine {able}",
            where=request.folder,
            remedy="Load the bundle on the CPU, or leave prefill out",
        )
    return Prefill("blocks", "only the CPU's own engine computes prompts by integers")
