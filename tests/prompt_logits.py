"""A prompt of random tokens, and the logits behind one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgephi.runtime.model import Model

LENGTH = 300


def prompt(length: int = LENGTH) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(3, 250, length)]


def last_logits(
    model: Model,
    tokens: list[int],
    pieces: tuple[int, ...] = (),
    scope: str | None = "test",
    adapter: str | None = None,
) -> NDArray[np.float32]:
    """Of a prompt, given in one or in several calls, in a cache that was empty or that others left."""
    rows = []
    sequence = model.open_sequence(len(tokens) + 2, scope=scope, adapter=model.find_adapter(adapter))
    start = sequence.reuse(tokens)
    for stop in (*pieces, len(tokens)):
        sequence.prefill(tokens[start:stop], lambda: False)
        start = stop

    def choose(row: NDArray[np.float32]) -> int:
        rows.append(row.copy())
        return 5

    sequence.step(choose)
    sequence.close()
    return rows[0]
