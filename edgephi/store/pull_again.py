"""What to do where an installed model has no graph for a device: the runtime names an export, the store a pull."""

from __future__ import annotations

from pathlib import Path

from edgephi.devices.profile import load_profile
from edgephi.devices.providers import provider, providers_of
from edgephi.errors import NoGraphError
from edgephi.installed import copyable
from edgephi.store.library import read_record
from edgephi.store.names import as_name, known_models, name_for
from edgephi.store.places import models_folder


def name_pull(error: NoGraphError) -> NoGraphError:
    """The same error with the `edgephi pull` that gets the graph, if it speaks of a model that was pulled; else itself.

    A model that somebody else put into the store is left to the runtime's remedy: nobody knows where it came from.
    """
    command = _command(error)
    if command is None:
        return error
    remedy = f"Install it with one: `{command}`"
    return NoGraphError(error.what, where=error.where, remedy=remedy, device=error.device)


def _command(error: NoGraphError) -> str | None:
    if error.where is None or error.device is None:
        return None
    folder = Path(error.where)
    name = as_name(folder.name)
    if name is None or folder.parent.absolute() != models_folder().absolute():
        return None
    record = read_record(name)
    if record is None or record.notes:  # they say why a GPU cannot have one
        return None
    known = known_models().get(name)
    source = name if known is not None and record.source in (known.hub, known.name) else record.source
    words = ["edgephi", "pull", source]
    if _is_compiled(error.device):  # that bundle runs nowhere else, so this one stays
        words += ["--name", f"{name}-npu", "--device", error.device]
    else:
        words += [*(["--name", name] if name_for(source) != name else []), "--device", error.device, "--force"]
    words += ["--revision", record.asked] if record.asked else []
    words += ["--quantize", record.quantize] if record.quantize != "auto" else []
    return copyable(*words)


def _is_compiled(device: str) -> bool:
    """Whether what is exported for a device is compiled for one chip."""
    members = providers_of(device)
    return members[0].compiled if members else provider(load_profile(device).prefill[0]).compiled
