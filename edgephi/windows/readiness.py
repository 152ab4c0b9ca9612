"""Whether edgephi's model is ready, in Windows' words: what the store (`edgephi.store.readiness`) says, mapped."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from edgephi.errors import DownloadError, EdgephiError
from edgephi.windows.enums import AIFeatureReadyResultState, AIFeatureReadyState
from edgephi.windows.operation import Cancellation
from edgephi.windows.results import AIFeatureReadyResult


class NamedState(Protocol):
    """A member of `edgephi.store.readiness.ReadyState`."""

    @property
    def name(self) -> str: ...


class Readiness(Protocol):
    """`edgephi.store.readiness.Readiness`; bytes are those of all phases together."""

    @property
    def state(self) -> NamedState: ...
    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int | None: ...


class ReadinessStore(Protocol):
    """What is used of the module `edgephi.store.readiness`."""

    def ready_state(self, name: str, **where: str) -> Readiness: ...

    def ensure_ready(
        self,
        name: str,
        *,
        on_progress: Callable[[Readiness], None] | None,
        cancelled: Callable[[], bool] | None,
        **where: str,
    ) -> object: ...


STATES = {
    "NOT_INSTALLED": AIFeatureReadyState.NotReady,
    "DOWNLOADING": AIFeatureReadyState.NotReady,
    "EXPORTING": AIFeatureReadyState.NotReady,
    "COMPILING": AIFeatureReadyState.NotReady,
    "READY": AIFeatureReadyState.Ready,
    "NOT_SUPPORTED": AIFeatureReadyState.NotSupportedOnCurrentSystem,
}


def _store() -> ReadinessStore:
    return cast(ReadinessStore, import_module("edgephi.store.readiness"))


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
    return STATES[_store().ready_state(model, **_where(device)).state.name]


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
        share = min(1.0, now.done_bytes / now.total_bytes) if now.total_bytes else 0.0
        if share > done:
            done = share
            emit(share)

    if not is_folder(model):
        try:
            _store().ensure_ready(model, on_progress=report, cancelled=lambda: cancellation.cancelled, **_where(device))
        except EdgephiError as error:
            return AIFeatureReadyResult(AIFeatureReadyResultState.Failure, error, isinstance(error, DownloadError))
    if done < 1:
        emit(1.0)
    return AIFeatureReadyResult(AIFeatureReadyResultState.Success)


def _where(device: str) -> dict[str, str]:
    """The device, where one was named."""
    return {} if device == "auto" else {"device": device}
