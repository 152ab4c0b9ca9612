"""Which model stands behind the classes: Windows has one, edgephi any number."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, get_args

from edgephi.arguments import require_choice, require_path, wrong
from edgephi.windows.backend import Backend

if TYPE_CHECKING:
    from edgephi.runtime.model import Model
    from edgephi.windows.moderation import Moderator

MODEL_VARIABLE = "EDGEPHI_WINDOWS_MODEL"
BACKEND_VARIABLE = "EDGEPHI_WINDOWS_BACKEND"
DEFAULT_MODEL = "phi-4-mini"

BackendName = Literal["edgephi", "system"]

_chosen: Backend | None = None


def use_model(
    model: str | os.PathLike[str] | Model | None = None,
    *,
    device: str = "auto",
    backend: BackendName = "edgephi",
    moderator: Moderator | None = None,
) -> None:
    """Say which model `LanguageModel.get_ready_state`, `ensure_ready_async` and `create_async` are about from now on; a
    language model that was created before keeps its own. Loads nothing.

    Args:
        model: a name in the store, a bundle's folder, or a model that `edgephi.load` gave, which stays open when it is
            closed here. None: what EDGEPHI_WINDOWS_MODEL says, or phi-4-mini.
        device: as for `edgephi.load`.
        backend: `edgephi`, or `system` for Windows' own model, through the bindings of the extra `windows`.
        moderator: what judges prompts and answers. None: nothing does. Windows' own model has its own.

    Raises:
        UsageError: an argument of another type, or a model, device or moderator for Windows' own model.
    """
    global _chosen
    _chosen = _backend(model, device, backend, moderator)


def backend() -> Backend:
    """What `use_model` chose, or what the environment says."""
    if _chosen is not None:
        return _chosen
    named = os.environ.get(BACKEND_VARIABLE, "edgephi")
    require_choice(BACKEND_VARIABLE, named, get_args(BackendName))
    return _backend(None, "auto", "system" if named == "system" else "edgephi", None)


def _backend(
    model: str | os.PathLike[str] | Model | None, device: str, name: BackendName, moderator: Moderator | None
) -> Backend:
    require_choice("backend", name, get_args(BackendName))
    if moderator is not None and not callable(moderator):
        raise wrong("moderator", moderator, "a function, or None")
    if name == "system":
        own = "none with backend='system': Windows' own model has its own"
        if model is not None:
            raise wrong("model", model, own)
        if device != "auto":
            raise wrong("device", device, own)
        if moderator is not None:
            raise wrong("moderator", moderator, own)
        from edgephi.windows.system import SystemBackend

        return SystemBackend()
    from edgephi.windows.phi import PhiBackend

    if model is None:
        model = os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
    if isinstance(model, str | os.PathLike):
        require_path("model", model)
        return PhiBackend(os.fspath(model), device, moderator)
    from edgephi.runtime.model import Model

    if not isinstance(model, Model):
        raise wrong("model", model, "a name, a folder, or a model that edgephi.load gave")
    return PhiBackend(model, device, moderator)
