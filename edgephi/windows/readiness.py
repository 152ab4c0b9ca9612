"""Whether edgephi's model is ready, in Windows' words: what the store (`edgephi.store.readiness`) says, mapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.errors import DownloadError, EdgephiError
from edgephi.windows.enums import AIFeatureReadyResultState, AIFeatureReadyState
from edgephi.windows.operation import Cancellation
from edgephi.windows.results import AIFeatureReadyResult

if TYPE_CHECKING:
    from edgephi.store import Readiness


def is_folder(model: str) -> bool:
    """Whether a model is named by its folder; the store keeps those that are named by a name."""
    return Path(model).is_dir()


def ready_state(model: str, device: str) -> AIFeatureReadyState:
    """Of a model by its name or folder. Whether a folder is intact shows when it is loaded.

    Raises:
        EdgephiError: the store knows no such name or device.
    """
    if is_folder(model):
        return AIFeatureReadyState.Ready
    from edgephi.store import readiness

    state = readiness.ready_state(model, device).state
    if state is readiness.ReadyState.READY:
        return AIFeatureReadyState.Ready
    if state is readiness.ReadyState.NOT_SUPPORTED:
        return AIFeatureReadyState.NotSupportedOnCurrentSystem
    return AIFeatureReadyState.NotReady


def ensure_ready(
    model: str, device: str, emit: Callable[[float], None], cancellation: Cancellation
) -> AIFeatureReadyResult:
    """Download, export and compile what is missing.

    Args:
        emit: called with how much is done, from 0 to 1; it never goes back.
    """
    done = -1.0

    def report(now: Readiness) -> None:
        nonlocal done
        if now.fraction > done:
            done = now.fraction
            emit(done)

    if not is_folder(model):
        from edgephi.store import readiness

        try:
            readiness.ensure_ready(model, device=device, on_progress=report, cancelled=lambda: cancellation.cancelled)
        except EdgephiError as error:
            return AIFeatureReadyResult(AIFeatureReadyResultState.Failure, error, isinstance(error, DownloadError))
    if done < 1:
        emit(1.0)
    return AIFeatureReadyResult(AIFeatureReadyResultState.Success)
