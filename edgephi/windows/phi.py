"""The backend that is edgephi's: a bundle, on the NPU, a GPU or the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgephi.windows import readiness
from edgephi.windows.enums import AIFeatureReadyResultState, AIFeatureReadyState
from edgephi.windows.operation import Cancellation
from edgephi.windows.results import AIFeatureReadyResult

if TYPE_CHECKING:
    from edgephi.runtime.model import Model
    from edgephi.windows.moderation import Moderator
    from edgephi.windows.phi_model import PhiModel


class PhiBackend:
    """A model by its name in the store, its folder, or already loaded (then it stays open when it is closed here)."""

    def __init__(self, model: str | Model, device: str, moderator: Moderator | None) -> None:
        self._model, self._device, self._moderator = model, device, moderator

    def ready_state(self) -> AIFeatureReadyState:
        if isinstance(self._model, str):
            return readiness.ready_state(self._model, self._device)
        return AIFeatureReadyState.Ready

    def ensure_ready(self, emit: Callable[[float], None], cancellation: Cancellation) -> AIFeatureReadyResult:
        if isinstance(self._model, str):
            return readiness.ensure_ready(self._model, self._device, emit, cancellation)
        emit(1.0)
        return AIFeatureReadyResult(AIFeatureReadyResultState.Success)

    def open(self) -> PhiModel:
        from edgephi.store.loading import load
        from edgephi.windows.phi_model import PhiModel

        if not isinstance(self._model, str):
            return PhiModel(self._model, self._moderator, lambda: None)
        model = load(self._model, self._device)
        return PhiModel(model, self._moderator, model.close)
