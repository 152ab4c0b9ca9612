"""The hidden states before the first layer: rows of the embedding, read for the tokens that occur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgephi.export.checkpoint.tensors import require_finite, weight_slices
from edgephi.export.spec import Architecture
from edgephi.export.weights.pack import VALUES_PER_SLICE
from edgephi.export.weights.transforms import read_slice

Float32 = NDArray[np.float32]
TokenIds = NDArray[np.int64]


def embed(architecture: Architecture, tokens: TokenIds) -> Float32:
    """Embedding rows, float32 [sequences, length, hidden], of tokens, int64 [sequences, length].

    Raises:
        WeightError, SourceError: see `embed_sequences`.
    """
    return np.stack(embed_sequences(architecture, list(tokens)))


def embed_sequences(architecture: Architecture, sequences: Sequence[TokenIds]) -> list[Float32]:
    """Embedding rows [n, hidden] of every sequence [n]; of the table, slices in which a token is are read, each once.

    Raises:
        WeightError: a row holds NaN or infinite values.
        SourceError: the file ends early.
    """
    used, places = np.unique(np.concatenate(sequences), return_inverse=True)
    rows = np.empty((len(used), architecture.spec.hidden_size), np.float32)
    table = architecture.weights["embed.weight"]
    for row, tensors, start, stop in weight_slices(table, VALUES_PER_SLICE):
        first, last = np.searchsorted(used, [row, row + (stop - start) * len(tensors)])
        if first < last:
            rows[first:last] = read_slice(table, tensors, start, stop)[used[first:last] - row]
    require_finite(rows, table.parts[0].tensor)
    rows *= np.float32(architecture.spec.embedding_scale)
    ends = np.cumsum([len(ids) for ids in sequences])[:-1]
    return [rows[part] for part in np.split(places, ends)]
