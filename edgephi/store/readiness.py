"""How far a model is from answering, and making it ready: what the command, the Windows API and the server ask."""

from __future__ import annotations

from collections.abc import Callable

from edgephi.errors import BundleError, UsageError
from edgephi.store.library import InstalledModel, find_installed
from edgephi.store.names import known_models, not_installed, require_name
from edgephi.store.phases import Readiness as Readiness
from edgephi.store.phases import ReadyState as ReadyState
from edgephi.store.progress_file import running
from edgephi.store.pulling import is_ready, pull, unsupported
from edgephi.store.target import Target, needed_for, too_large


def ready_state(name: str, device: str = "auto") -> Readiness:
    """What a model of the store needs before it can answer; nothing is changed and nothing is downloaded.

    Args:
        name: of an installed model, of one that is being pulled, or a short name.
        device: as `edgephi.load` takes it.

    Returns:
        The state, for a pull that is running (in any process) with how far it is.

    Raises:
        ModelNotInstalledError: no such name.
        UsageError: it can be no name.
        DeviceError: no such profile of a device.
    """
    name = require_name(name)
    known, model, pulling = known_models().get(name), find_installed(name), running(name)
    if known is None and model is None and pulling is None:
        raise not_installed(name, [])
    target = needed_for(device)
    if why := target.unsupported or too_large(known):
        return Readiness(ReadyState.NOT_SUPPORTED, why)
    if model is not None and is_ready(model, target):
        return Readiness(ReadyState.READY, done_bytes=model.bytes, total_bytes=model.bytes, seconds_left=0.0)
    if pulling is not None:
        return pulling.readiness
    size = known.download_bytes if known else None
    if model is None:
        return Readiness(ReadyState.NOT_INSTALLED, "it was not pulled yet", phase_total_bytes=size)
    return Readiness(ReadyState.NOT_INSTALLED, _lacks(model, target), phase_total_bytes=size)


def _lacks(model: InstalledModel, target: Target) -> str:
    """Why an installed model is not ready."""
    missing = sorted(target.graphs - set(model.devices))
    return model.problem or f"it is installed without a graph for {', '.join(missing)}"


def ensure_ready(
    name: str,
    *,
    device: str = "auto",
    on_progress: Callable[[Readiness], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> InstalledModel:
    """Make a model ready: pull it unless it is.

    Args:
        name: an installed model's, or anything that `pull` takes.
        device, on_progress, cancelled: as for `pull`.

    Raises:
        CancelledError: `cancelled` said so.
        BundleError: it is damaged or lacks a graph, and was not pulled.
        EdgephiError: as `pull`.
    """
    try:
        model = find_installed(require_name(name))
    except UsageError:  # a hub id or a path
        model = None
    if model is None:
        return pull(name, device=device, on_progress=on_progress, cancelled=cancelled)
    target = needed_for(device)
    if why := target.unsupported or too_large(known_models().get(model.name)):
        raise unsupported(model.name, why)
    if is_ready(model, target):
        if on_progress is not None:
            on_progress(Readiness(ReadyState.READY, done_bytes=model.bytes, total_bytes=model.bytes, seconds_left=0.0))
        return model
    if model.pulled is None:  # what a stranger's manifest calls its source is no place to fetch from
        raise BundleError(
            f"{model.name} cannot be used: {_lacks(model, target)}",
            where=model.folder,
            remedy=f"It was not pulled, so make it again yourself: `edgephi rm {model.name}`, then pull or export it",
        )
    return pull(
        model.source,
        name=model.name,
        device=device,
        revision=model.pulled.revision,
        quantize=model.pulled.quantize,
        on_progress=on_progress,
        cancelled=cancelled,
    )
