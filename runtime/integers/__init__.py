"""Prompts by integer products: a second graph of a bundle, made and proved on the machine that runs it."""

from __future__ import annotations

import os
from typing import Literal, get_args

from edgephi.errors import UsageError

PrefillChoice = Literal["auto", "blocks", "integers"]

SWITCH = "EDGEPHI_PREFILL"
"""Environment variable that takes the place of 'auto' where the caller chose nothing."""


def prefill_choice(asked: PrefillChoice | None) -> PrefillChoice:
    """What is to compute prompts: the argument, or EDGEPHI_PREFILL, or auto.

    Raises:
        UsageError: neither is one of the three words.
    """
    chosen = asked if asked is not None else os.environ.get(SWITCH) or "auto"
    if not isinstance(chosen, str) or chosen not in get_args(PrefillChoice):
        raise UsageError(
            f"prefill is {chosen!r}",
            where=SWITCH if asked is None else None,
            remedy="Choose auto, blocks or integers",
        )
    return chosen  # type: ignore[return-value]  # one of the words
