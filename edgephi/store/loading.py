"""`edgephi.load`: a model by its name in the store, or by its folder."""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from edgephi.errors import NoGraphError
from edgephi.runtime.loading import load as load_folder
from edgephi.runtime.model import Model
from edgephi.store.library import find
from edgephi.store.pull_again import name_pull


@wraps(load_folder)
def load(folder: str | os.PathLike[str], *arguments: Any, **options: Any) -> Model:
    """As `edgephi.runtime.loading.load`, of a folder or of the name of an installed model; nothing is downloaded."""
    try:
        return load_folder(find(folder) if isinstance(folder, str) else folder, *arguments, **options)
    except NoGraphError as error:
        raise name_pull(error) from error.__cause__
