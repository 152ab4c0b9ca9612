"""What `chat` and `generate` do with the options they share: the sampling, and the model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgephi.runtime.integers import PrefillChoice

if TYPE_CHECKING:
    from edgephi.runtime.model import Model
    from edgephi.runtime.sampling import SamplingOptions

ADAPTER = "adapter"
"""Name of the only one that a command is given."""


def checked_sampling(*, max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> SamplingOptions:
    """The arguments of `Sampling`, refused before a model is loaded.

    Raises:
        UsageError: one is outside its range.
    """
    from edgephi.runtime.sampling import Sampling

    sampling: SamplingOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    Sampling(**sampling)
    return sampling


def load_model(
    folder: Path,
    device: str,
    *,
    fallback: bool,
    engine: str | None,
    speculation: bool | None,
    adapter: Path | None,
    prefill: PrefillChoice | None,
) -> tuple[Model, str | None]:
    """Load a bundle, with a line on a terminal meanwhile; the model, and the name of its adapter if there is one.

    Raises:
        EdgephiError: as `edgephi.runtime.loading.load`.
    """
    from edgephi.commands.terminal.console import waiting
    from edgephi.runtime.loading import load

    with waiting(f"loading {folder.absolute().name}"):
        model = load(
            folder,
            device,
            fallback=fallback,
            engine=engine,
            speculation=speculation,
            adapters=None if adapter is None else {ADAPTER: adapter},
            prefill=prefill,
        )
    return model, None if adapter is None else ADAPTER
