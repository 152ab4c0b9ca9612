"""Does a graph whose weights were packed beforehand compute what the graph itself computes?

onnxruntime 1.31 lays some packed weights out by the address they are packed at, and does not keep that alignment in the
file it writes. Mapped from there, weights of some shapes (rows of 288 in blocks of 32, for example) are read at the
wrong place: the session loads without a word and answers something else. So both graphs answer before one takes the
other's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import LOGIT_ROWS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

LENGTHS = (1, 7)
"""Tokens of the two sequences: onnxruntime has kernels of its own for a single row."""
CLOSE = 1e-3
"""Largest difference of two logits, over the standard deviation of all. The same kernels run over the same numbers."""
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int64)": np.int64,
}


def same_answers(plain: InferenceSession, packed: InferenceSession) -> bool:
    """Whether two sessions give the same logits, on two short sequences.

    Args:
        plain: over the bundle's own graph, on the CPU.
        packed: over the optimized graph, its weights packed in a file beside it.

    Raises:
        Exception: onnxruntime's own, which have no common base: it does not run one of the two.
    """
    for length in LENGTHS:
        feeds = feeds_of(plain, range(1, length + 1))
        if any(port.name == LOGIT_ROWS for port in plain.get_overridable_initializers()):
            feeds[LOGIT_ROWS] = np.arange(length, dtype=np.int64)  # drafts and evaluation have the head compute several
        expected, given = (session.run(["logits"], feeds)[0].astype(np.float32) for session in (plain, packed))
        difference, spread = np.abs(expected - given).max(), expected.std()
        if not (np.isfinite(difference) and difference <= CLOSE * spread):
            return False
    return True


def feeds_of(session: InferenceSession, tokens: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Token ids behind an empty KV cache; inputs that may be left out are."""
    feeds: dict[str, NDArray[Any]] = {}
    length = len(tokens)
    for given in session.get_inputs():
        dtype = _DTYPES[given.type]
        if given.name == "input_ids":
            feeds[given.name] = np.asarray(tokens, dtype)[None]
        elif given.name == "attention_mask":
            feeds[given.name] = np.ones((1, length), dtype)
        elif given.name == "position_ids":
            feeds[given.name] = np.arange(length, dtype=dtype)[None]
        else:
            _, heads, _, head_dim = given.shape  # keys or values
            feeds[given.name] = np.zeros((1, heads, 0, head_dim), dtype)
    return feeds
