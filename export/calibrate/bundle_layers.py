"""A finished CPU graph, one layer at a time over the weights that were written, so that memory holds one layer.

Whole sequences go through every layer from an empty KV cache, each on one thread: how a product is cut, and so rounded,
depends on nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgephi.bundle import ROPE_SWITCH
from edgephi.errors import EngineError, library_errors
from edgephi.export.graph.attention import kv_cache
from edgephi.export.graph.builder import GraphBuilder, KvScales
from edgephi.export.graph.head import embed, head_inputs
from edgephi.export.graph.layer import decoder_layers
from edgephi.export.graph.layer_graph import HEAD_IN, HIDDEN_IN, HIDDEN_OUT, LOGITS, MASK
from edgephi.export.graph.norms import normalize
from edgephi.export.graph.positions import positions
from edgephi.export.graph.variants import Variant
from edgephi.export.spec import HEAD, DecoderSpec
from edgephi.export.weights.layout import Layout
from edgephi.ort import open_session, session_options
from edgephi.quantize.workers import worker_threads

if TYPE_CHECKING:
    import onnx_ir as ir

Values = NDArray[np.floating[Any]]

HEAD_ROWS = 8_192
"""Of the vocabulary, multiplied together: a vocabulary of 200k in float32 would take gigabytes."""
TOKENS = "input_ids"
_FAILED, _REPORT = "onnxruntime cannot run the finished graph", "Report this with the model's name"


@dataclass(frozen=True)
class Window:
    """A sequence on its way through the layers."""

    hidden: Values
    """[length, hidden]"""
    long_rope: bool = False
    """It takes the rope of long sequences, in a model with two."""


class BundleLayers:
    """The parts of a bundle's CPU graph.

    Args:
        variant: the CPU's graphs.
        folder: where the data file is.
    """

    def __init__(self, spec: DecoderSpec, layout: Layout, variant: Variant, folder: Path) -> None:
        self._spec, self._layout, self._variant, self._folder = spec, layout, variant, folder
        self._type = np.dtype(variant.recipe.float_type)

    def embedded(self, ids: NDArray[np.int64]) -> Values:
        """Hidden states [length, hidden] of tokens [length]."""
        import onnx_ir as ir

        emit = self._builder()
        tokens = emit.port(TOKENS, ["batch_size", "sequence_length"], ir.DataType.INT64)
        output = emit.port(HIDDEN_OUT, ["batch_size", "sequence_length", self._spec.hidden_size])
        emit.op("Identity", "/model/embed_tokens/output", [embed(emit, self._spec, tokens)], output=output)
        session = self._session(emit.model([tokens], [output]), "the embedding")
        return self._run(session, [HIDDEN_OUT], {TOKENS: ids[None]}, "the embedding")[0]

    def through(
        self, layer: int, windows: Sequence[Window], scales: KvScales | None = None
    ) -> Iterator[tuple[Values, Values, Values]]:
        """Of each window in turn hidden states [length, hidden] behind a layer, and its keys, rotated, and values
        [kv_heads, length, head_dim]: codes, where `scales` are given.

        Raises:
            EngineError: onnxruntime refuses the layer, or hidden states are not finite.
        """
        spec, where = self._spec, f"layers.{layer}"
        session = self._session(self._layer_graph(layer, scales), where)
        optional = {port.name for port in session.get_overridable_initializers()}
        dtype = self._type if scales is None else np.dtype(np.int8)
        empty = np.zeros((1, spec.kv_heads, 0, spec.head_dim), dtype)
        past = {f"past_key_values.{layer}.{part}": empty for part in ("key", "value")}
        outputs = [HIDDEN_OUT, f"present.{layer}.key", f"present.{layer}.value"]

        def one(window: Window) -> tuple[Values, Values, Values]:
            mask = np.ones((1, len(window.hidden)), np.int64)
            feeds = {HIDDEN_IN: window.hidden[None], MASK: mask, **past}
            if ROPE_SWITCH in optional and window.long_rope:
                feeds[ROPE_SWITCH] = np.zeros(1, np.int64)
            hidden, keys, values = self._run(session, outputs, feeds, where)
            if not np.isfinite(hidden).all():
                raise EngineError("hidden states are not finite", where=where, remedy="Check the checkpoint")
            return hidden, keys, values

        with ThreadPoolExecutor(worker_threads(), "edgephi-kv") as pool:
            yield from pool.map(one, windows)

    def head_inputs(self, hidden: Values) -> Values:
        """What the head multiplies, [length, columns], of hidden states [length, hidden] behind the last layer."""
        emit, spec = self._builder(), self._spec
        states = emit.port(HIDDEN_IN, ["batch_size", "sequence_length", spec.hidden_size])
        given = head_inputs(emit, spec, normalize(emit, spec, "norm", "/model/final_norm/LayerNorm", states))
        output = emit.port(HEAD_IN, ["batch_size", "sequence_length", "head_columns"])
        emit.op("Identity", "/lm_head/input/Identity", [given], output=output)
        session = self._session(emit.model([states], [output]), "the last norm")
        return self._run(session, [HEAD_IN], {HIDDEN_IN: hidden[None]}, "the last norm")[0]

    def logits(self, inputs: Sequence[Values]) -> Iterator[list[NDArray[np.float32]]]:
        """Logits [length, some tokens] of each of several `head_inputs`, a part of the vocabulary at a time; tokens
        that the model suppresses are left out."""
        spec = self._spec
        for start in range(0, spec.vocabulary_size, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, spec.vocabulary_size)
            emit = self._builder()
            states = emit.port(HEAD_IN, ["batch_size", "sequence_length", "head_columns"])
            head = "head" if emit.stores(HEAD) else "embed"
            given = emit.linear_rows("/lm_head", states, head, (start, stop), ("", ""))
            output = emit.port(LOGITS, ["batch_size", "sequence_length", stop - start])
            emit.op("Identity", "/lm_head/output", [given], output=output)
            session = self._session(emit.model([states], [output]), "the head")
            kept = [token - start for token in range(start, stop) if token not in spec.suppressed_tokens]
            if kept:
                rows = (self._run(session, [LOGITS], {HEAD_IN: one[None]}, "the head")[0] for one in inputs)
                yield [np.asarray(row[:, kept], np.float32) for row in rows]

    def _layer_graph(self, layer: int, scales: KvScales | None) -> ir.Model:
        import onnx_ir as ir

        spec, emit = self._spec, self._builder({layer: scales} if scales is not None else None)
        hidden = emit.port(HIDDEN_IN, ["batch_size", "sequence_length", spec.hidden_size])
        mask = emit.port(MASK, ["batch_size", "total_sequence_length"], ir.DataType.INT64)
        cache = kv_cache(emit, spec, layer)
        # of the token ids only the length is read, which hidden states have on the same axis
        where = positions(emit, spec, hidden, mask)
        total, update = decoder_layers(emit, spec, hidden, {layer: cache}, where)
        output = emit.port(HIDDEN_OUT, ["batch_size", "sequence_length", spec.hidden_size])
        emit.op("Add", f"/model/layers.{layer}/residual/Add", [total, update], output=output)
        inputs = [hidden, mask, cache.past_key, cache.past_value]
        if where.rope_switch is not None:
            inputs.append(where.rope_switch)
        return emit.model(inputs, [output, cache.present_key, cache.present_value])

    def _builder(self, scales: dict[int, KvScales] | None = None) -> GraphBuilder:
        one = self._variant
        return GraphBuilder(self._layout, one.recipe, opset=one.opset, row_numbers=one.row_numbers, kv_scales=scales)

    def _session(self, model: ir.Model, where: str) -> Any:
        import onnx_ir as ir

        options = session_options(
            threads=1, spinning=False, kleidiai=False, arena=False, memory_pattern=False, data_folder=self._folder
        )
        graph = ir.to_proto(model).SerializeToString()
        return open_session(graph, options, where=where, remedy=_REPORT, refusal=_FAILED)

    def _run(self, session: Any, outputs: list[str], feeds: dict[str, NDArray[Any]], where: str) -> list[Values]:
        """Without the axis of a batch of one."""
        with library_errors(_FAILED, where=where, remedy=_REPORT):
            return [values[0] for values in session.run(outputs, feeds)]
