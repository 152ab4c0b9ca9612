"""The float model of a checkpoint, one layer at a time, so that a laptop can judge a model larger than its memory.

Every layer's weights are written as float32 to a temporary file, onnxruntime maps it, all sequences go through, the
file is deleted, and the next layer follows. Memory holds one layer and the hidden states (tokens · hidden · 4 bytes).
The temporary folder is Python's (`TMPDIR`), and takes the largest piece, which is often the head.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgephi.devices.cpu import decode_threads
from edgephi.errors import OutputError, UsageError, library_errors
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.layer_graph import (
    HEAD_IN,
    HIDDEN_IN,
    LOGITS,
    MASK,
    before_head,
    before_head_graph,
    decoder_end,
    end_graph,
    layer_graph,
    single_layer,
)
from edgephi.export.spec import Architecture, DecoderSpec
from edgephi.export.weights.embedding import TokenIds, embed_sequences
from edgephi.export.weights.layout import Layout, plan_storage
from edgephi.export.weights.pack import pack_weights
from edgephi.export.weights.recipe import Recipe, make_recipe
from edgephi.ort import open_session, session_options

if TYPE_CHECKING:
    import onnx_ir as ir

Float32 = NDArray[np.float32]
BuildGraph = Callable[[DecoderSpec, Layout, Recipe], "ir.Model"]

GRAPH = "model.onnx"
RESERVE = 64 * 2**20
"""Disk left free in the temporary folder."""


class FloatLogits:
    """The predictions of a float model for the sequences that went through it. Made by `float_logits`."""

    def __init__(self, spec: DecoderSpec, hidden: list[Float32], session: Any) -> None:
        self.vocabulary = spec.vocabulary_size
        self._hidden, self._session = hidden, session

    def logits(self, sequence: int, start: int, stop: int) -> Float32:
        """Logits [stop - start, vocabulary] at those positions of a sequence, given by its number."""
        return _run(self._session, [LOGITS], {HIDDEN_IN: self._hidden[sequence][None, start:stop]})


@contextmanager
def float_logits(
    architecture: Architecture,
    sequences: Sequence[TokenIds],
    on_step: Callable[[], None] = lambda: None,
    on_layer: Callable[[int, Sequence[Float32]], None] = lambda layer, hidden: None,
) -> Iterator[FloatLogits]:
    """Run sequences through a checkpoint in float32; logits are computed later, for the positions that are asked for.

    Args:
        architecture: what `export.families.describe` returns.
        sequences: token ids int64 [n], each a sequence of its own with an empty KV cache.
        on_step: called `layers` times.
        on_layer: told the number of each layer and the hidden states [n, hidden] of every sequence behind it.

    Raises:
        UsageError: a sequence is empty or longer than the context, or holds an id outside the vocabulary.
        OutputError: the temporary folder has no room for a layer.
        WeightError, SourceError: the checkpoint is damaged.
        EngineError: onnxruntime refuses a layer.
    """
    spec = architecture.spec
    longest = _check(spec, sequences)
    hidden = embed_sequences(architecture, sequences)
    empty = np.zeros((1, spec.kv_heads, 0, spec.head_dim), np.float32)
    cache = {"past_key_values.0.key": empty, "past_key_values.0.value": empty}
    for layer in range(spec.layers):
        with _session(single_layer(architecture, layer, longest), layer_graph) as session:
            for index, states in enumerate(hidden):
                mask = np.ones((1, len(states)), np.int64)
                hidden[index] = _run(session, None, {HIDDEN_IN: states[None], MASK: mask, **cache})
        on_layer(layer, hidden)
        on_step()
    with _session(decoder_end(architecture), end_graph) as session:
        yield FloatLogits(spec, hidden, session)


@contextmanager
def end_of_model(architecture: Architecture) -> Iterator[Callable[[Float32], Float32]]:
    """The last norm and the head in float32: hidden states [n, hidden] to logits [n, vocabulary].

    Raises:
        OutputError, WeightError, SourceError, EngineError: see `float_logits`.
    """
    with _session(decoder_end(architecture), end_graph) as session:
        yield lambda hidden: _run(session, [LOGITS], {HIDDEN_IN: hidden[None]})


@contextmanager
def up_to_head(architecture: Architecture) -> Iterator[Callable[[Float32], Float32]]:
    """As `end_of_model`, without the head: hidden states [n, hidden] to what it multiplies, [n, columns]."""
    with _session(before_head(architecture), before_head_graph) as session:
        yield lambda hidden: _run(session, [HEAD_IN], {HIDDEN_IN: hidden[None]})


def _check(spec: DecoderSpec, sequences: Sequence[TokenIds]) -> int:
    """The longest sequence's length."""
    longest = max((len(ids) for ids in sequences), default=0)
    if longest > spec.context_length or not all(len(ids) for ids in sequences) or not longest:
        raise UsageError(
            f"sequences of up to {longest:,} tokens do not fit a context of {spec.context_length:,}, or one is empty",
            remedy="Take shorter windows, of at least one token",
        )
    if not all(0 <= ids.min() <= ids.max() < spec.vocabulary_size for ids in sequences):
        raise UsageError(
            f"a token id is outside the vocabulary of {spec.vocabulary_size:,}",
            remedy="Compare with the checkpoint the bundle was made from",
        )
    return longest


_FAILED = "onnxruntime failed on a layer of the float model"
_REPORT = "Report this with the model's name; it is a fault of edgephi"


@contextmanager
def _session(part: Architecture, build: BuildGraph) -> Iterator[Any]:
    """A session on a part of the model, its float32 weights in a temporary file."""
    import onnx_ir as ir

    recipe = make_recipe("fp32", 32)
    layout = plan_storage(part, recipe)
    temporary = Path(gettempdir())
    if shutil.disk_usage(temporary).free < layout.bytes + RESERVE:
        raise OutputError(
            f"a layer or head of the float model takes {layout.bytes / 1e6:,.0f} MB and the disk has less free",
            where=temporary,
            remedy="Free disk space, or set TMPDIR to a folder on another disk",
        )
    with TemporaryDirectory(prefix="edgephi-float-", ignore_cleanup_errors=True) as name:
        folder, threads = Path(name), decode_threads()
        pack_weights(part, layout, folder / DATA_FILE, None, threads, lambda count: None)
        ir.save(build(part.spec, layout, recipe), folder / GRAPH)
        # patterns are kept for every length, and packed weights are a copy of the layer instead of pages of the file
        options = session_options(threads=threads, arena=False, memory_pattern=False, prepacking=False)
        yield open_session(folder / GRAPH, options, where=None, remedy=_REPORT, refusal=_FAILED)


def _run(session: Any, outputs: list[str] | None, feeds: dict[str, NDArray[Any]]) -> Float32:
    """The first output of a run with a batch of one, without its batch axis."""
    with library_errors(_FAILED, remedy=_REPORT):
        result: Float32 = session.run(outputs, feeds)[0][0]
    return result
