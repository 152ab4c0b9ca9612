"""`load`: a folder becomes a model that answers, where its bundle and this machine allow it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from edgephi.arguments import require_flag, require_integer, require_path
from edgephi.bundle import read_manifest
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import BundleError, DeviceError, EngineError, UsageError
from edgephi.files import no_system_errors, refuse_path
from edgephi.runtime.adapters import load_adapters
from edgephi.runtime.engines import require_engine
from edgephi.runtime.engines.base import OpenRequest
from edgephi.runtime.engines.opening import EngineOpening
from edgephi.runtime.integers import PrefillChoice, prefill_choice
from edgephi.runtime.model import Model
from edgephi.runtime.placement.config import read_config
from edgephi.runtime.placement.dispatch import plan, verify_placement
from edgephi.runtime.placement.examined import examine
from edgephi.runtime.placement.place import ProviderChoice, asked_to_spin
from edgephi.runtime.prefix import default_prefix_bytes
from edgephi.runtime.prepacked.packing import Prepacking, prepacking

MOST_PARALLEL = 64


@no_system_errors(BundleError)
def load(
    folder: str | os.PathLike[str],
    device: str | os.PathLike[str] = "auto",
    *,
    fallback: bool = False,
    threads: int | None = None,
    spinning: bool | None = None,
    verify: bool = False,
    prepacked: Prepacking | None = None,
    engine: str | None = None,
    max_parallel: int = 4,
    prefix_cache_bytes: int | None = None,
    speculation: bool | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    prefill: PrefillChoice | None = None,
) -> Model:
    """Load a bundle.

    Args:
        folder: what `edgephi export` wrote.
        device: `auto`, `cpu`, `gpu`, `npu`, or a device profile: a name that `edgephi devices` lists or a .toml file.
            auto is the first provider of the matching profile that the bundle has a graph and the machine a device
            for. Simulators and software drivers are used only by a profile that is named.
        fallback: when the device cannot run the bundle, take the profile's next provider, and say so in every answer.
        threads: of the CPU; by default the profile's, or one per fast physical core this process may use.
        spinning: whether CPU threads without work wait actively, which is faster and keeps cores from resting. None: as
            the profile says, else on mains unless the system saves power. `Model.place.choice.spinning` has why.
        verify: read and hash every byte of the bundle first, not only the small files.
        prepacked: on the CPU, weights can be kept in the user's cache (EDGEPHI_CACHE names another) in the form this
            processor reads, and mapped: a faster load with less memory of its own. `auto` writes them at the second
            load of a bundle within 30 days, `now` at once, `never` not. None: what EDGEPHI_PREPACKED says, or auto.
        engine: `onnx` (plain onnxruntime, the CPU), `genai` (onnxruntime-genai, every provider but the NPU's) or `npu`.
            None: the first of these that runs the bundle on the device.
        max_parallel: answers that are computed in one run, where the engine can; more can be open at once.
        prefix_cache_bytes: of keys and values that are kept for prompts that begin alike, where the engine can. None: a
            sixteenth of the machine's memory, at most 2 GiB; 0: none.
        speculation: guess tokens from the text so far and verify several in one run, where the engine can. None: where
            a measurement here shows that it changes no answer. True: also where nearly equal tokens may change places.
        adapters: LoRA adapters that `edgephi adapter convert` wrote, by the names that answers ask for them by.
        prefill: what computes prompts on the CPU: the bundle's `blocks`; `integers`, made and measured when first asked
            for; `auto`, integers where they were made and memory is free. None: as EDGEPHI_PREFILL says, or auto.

    Raises:
        BundleError: the folder is not an intact bundle.
        TokenizerError: its tokenizer or chat template cannot be used.
        DeviceError: the device cannot run the bundle; its `step` says how far it came.
        EngineError: the runtime refuses it, or prompts are to be computed by integers and cannot.
        AdapterError: an adapter is not this bundle's or damaged, or the bundle or its engine takes none.
        OutputError: prepacked is `now` or integers are to be made, and the cache cannot be written.
        UsageError: an argument of another type, or outside its range.
    """
    _check_load_arguments(
        folder, device, fallback, verify, threads, spinning, max_parallel, prefix_cache_bytes, speculation
    )
    require_engine(engine)
    path = Path(folder)
    packing, prompts_by = prepacking(prepacked), prefill_choice(prefill)
    manifest = read_manifest(path)
    require_known_graphs(path, manifest)
    examine(path, manifest, every_byte=verify)
    given = load_adapters(adapters, manifest)
    planned = plan(path, manifest, os.fspath(device), fallback)
    rejected = planned.rejected

    def open_there(choice: ProviderChoice) -> Model:
        place, config = verify_placement(path, choice, rejected), read_config(path, manifest)
        request = OpenRequest(
            path,
            manifest,
            config,
            place,
            threads or place.threads,
            engine=engine,
            max_parallel=max_parallel,
            speculation=speculation,
            prefix_bytes=default_prefix_bytes() if prefix_cache_bytes is None else prefix_cache_bytes,
        )
        return Model(request, EngineOpening(request, packing, prompts_by, every_byte=verify), given)

    *first, last = [asked_to_spin(choice, spinning) for choice in planned.choices]
    for choice in first:
        try:
            return open_there(choice)
        except (DeviceError, EngineError) as error:
            rejected = (*rejected, str(error))
    return open_there(last)


def _check_load_arguments(
    folder: str | os.PathLike[str],
    device: str | os.PathLike[str],
    fallback: bool,
    verify: bool,
    threads: int | None,
    spinning: bool | None,
    max_parallel: int,
    prefix_cache_bytes: int | None,
    speculation: bool | None,
) -> None:
    """Raises UsageError for a value of another type or outside its range, BundleError for what is no path."""
    require_path("folder", folder, "the path of a bundle, as a text or a pathlib.Path")
    require_path("device", device, "'auto', 'cpu', 'gpu', 'npu', or a device profile")
    require_flag("fallback", fallback)
    require_flag("verify", verify)
    if spinning is not None:
        require_flag("spinning", spinning)
    refuse_path(BundleError, folder, device)
    if threads is not None:
        require_integer("threads", threads)
        if threads < 1:
            raise UsageError(f"threads is {threads}", remedy="Ask for at least 1 thread")
    require_integer("max_parallel", max_parallel)
    if not 1 <= max_parallel <= MOST_PARALLEL:
        raise UsageError(f"max_parallel is {max_parallel}", remedy=f"Choose from 1 to {MOST_PARALLEL}")
    if prefix_cache_bytes is not None:
        require_integer("prefix_cache_bytes", prefix_cache_bytes)
        if prefix_cache_bytes < 0:
            raise UsageError(f"prefix_cache_bytes is {prefix_cache_bytes}", remedy="Use 0 for none, or more")
    if speculation is not None:
        require_flag("speculation", speculation)
