"""A store of models on this machine: short names, what is installed, fetching and preparing what is not.

`find` turns a name or a folder into the folder of a bundle, `pull` installs a model, `installed` lists, `remove`
deletes, and `edgephi.store.readiness` says how far a model is from answering. What only looks something up stands on
files alone: `edgephi.export` is imported when something is exported.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from edgephi.store.library import InstalledModel, find, installed, remove
    from edgephi.store.phases import Readiness, ReadyState
    from edgephi.store.pulling import pull
    from edgephi.store.readiness import ensure_ready, ready_state

__all__ = [
    "InstalledModel",
    "Readiness",
    "ReadyState",
    "ensure_ready",
    "find",
    "installed",
    "pull",
    "ready_state",
    "remove",
]

_LAZY = {
    "InstalledModel": "library",
    "find": "library",
    "installed": "library",
    "remove": "library",
    "Readiness": "phases",
    "ReadyState": "phases",
    "pull": "pulling",
    "ensure_ready": "readiness",
    "ready_state": "readiness",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f"edgephi.store.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'edgephi.store' has no attribute {name!r}")
