"""A DecoderSpec becomes graphs of fixed shape: what the compiler of the Hexagon NPU takes.

A stage is a run of consecutive layers, once for a piece of the prompt and once for a single token, over the same KV
cache. Hidden states of a stage are those the next one reads. The embedding and the head stay on the CPU, where the
looked-up rows and the int8 head are what the CPU graph has.

Names and shapes of `past_sequence_length` and `total_sequence_length` are onnxruntime-genai's
(src/models/input_ids.cpp); their values are GroupQueryAttention's `seqlens_k` and `total_sequence_length`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.export.graph.attention import kv_cache
from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.graph.head import embed
from edgephi.export.graph.head import logits as emit_logits
from edgephi.export.graph.layer import decoder_layers
from edgephi.export.graph.norms import add_and_norm
from edgephi.export.graph.positions import Positions
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout
from edgephi.export.weights.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

INPUT_IDS, LOGITS = "input_ids", "logits"
LAST, TOTAL = "past_sequence_length", "total_sequence_length"


@dataclass(frozen=True)
class Stage:
    """Layers `first` to `last` - 1 of a decoder, for `tokens` tokens at a time and a cache of `cache_rows` rows."""

    first: int
    last: int
    tokens: int
    cache_rows: int

    @property
    def layers(self) -> range:
        return range(self.first, self.last)

    @property
    def name(self) -> str:
        """`prefill_0_8`, `decode_0_8`: also the name of the graph in its context binary."""
        return f"{'decode' if self.tokens == 1 else 'prefill'}_{self.first}_{self.last}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        past = (f"past_key_values.{layer}.{part}" for layer in self.layers for part in ("key", "value"))
        return (hidden_name(self.first), LAST, TOTAL, *past)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in order."""
        present = (f"present.{layer}.{part}" for layer in self.layers for part in ("key", "value"))
        return (hidden_name(self.last), *present)


def hidden_name(layer: int) -> str:
    """The hidden states that enter this layer; after the last layer, normalized, the head's input."""
    return f"hidden_states.{layer}"


def stage_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe, stage: Stage) -> ir.Model:
    """The layers of a stage in float16, every dimension a number; see `emit_stage`."""
    return emit_stage(StageBuilder(layout, recipe), spec, stage)


class StageBuilder(GraphBuilder):
    """What the NPU takes: no operator that adds and normalizes, and of attention's attributes only the needed ones."""

    fused_norms = False
    bare_attention = True


def emit_stage(emit: GraphBuilder, spec: DecoderSpec, stage: Stage) -> ir.Model:
    """The layers of a stage, with linear layers, norms and cache as the builder writes them.

    Inputs: hidden states, float16 [1, tokens, hidden]; int32 [1, 1] index of the last token; int32 [1] length of the
    cache; keys and values [1, kv_heads, cache_rows, head_dim]. Outputs: hidden states, and the cache with the rows of
    the new tokens filled in. The last stage ends with the final norm.
    """
    import onnx_ir as ir

    half, shape = ir.DataType.FLOAT16, [1, stage.tokens, spec.hidden_size]
    taken, given = (emit.port(hidden_name(layer), shape, half) for layer in (stage.first, stage.last))
    last = emit.port(LAST, [1, 1], ir.DataType.INT32)
    total = emit.port(TOTAL, [1], ir.DataType.INT32)
    caches = {layer: kv_cache(emit, spec, layer, stage.cache_rows) for layer in stage.layers}
    hidden = emit.cast("/model/hidden", taken, half, emit.float)
    hidden, update = decoder_layers(emit, spec, hidden, caches, Positions(last, total))
    target = given if emit.float == half else None
    if stage.last == spec.layers:
        _, result = add_and_norm(emit, spec, "norm", hidden, update, target)
    else:
        result = emit.op("Add", f"/model/layers.{stage.last - 1}/residual/Add", [hidden, update], output=target)
    if target is None:
        emit.cast("/model/normed", result, emit.float, half, given)
    past = [value for cache in caches.values() for value in (cache.past_key, cache.past_value)]
    present = [value for cache in caches.values() for value in (cache.present_key, cache.present_value)]
    return emit.model([taken, last, total, *past], [given, *present], stage.name)


def embedding_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe) -> ir.Model:
    """Token ids, int64 [1, length], become hidden states, float16 [1, length, hidden]."""
    import onnx_ir as ir

    emit = GraphBuilder(layout, recipe)
    ids = emit.port(INPUT_IDS, [1, "length"], ir.DataType.INT64)
    hidden = emit.port(hidden_name(0), [1, "length", spec.hidden_size], ir.DataType.FLOAT16)
    emit.cast("/model/embed_tokens", embed(emit, spec, ids), emit.float, ir.DataType.FLOAT16, hidden)
    return emit.model([ids], [hidden], "embedding")


def head_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe) -> ir.Model:
    """Normalized hidden states, float16 [1, length, hidden], become logits, float32 [1, length, vocabulary]."""
    import onnx_ir as ir

    emit = GraphBuilder(layout, recipe)
    hidden = emit.port(hidden_name(spec.layers), [1, "length", spec.hidden_size], ir.DataType.FLOAT16)
    single = emit.cast("/lm_head", hidden, ir.DataType.FLOAT16, emit.float)
    logits = emit.port(LOGITS, [1, "length", spec.vocabulary_size])
    emit_logits(emit, spec, single, logits)
    return emit.model([hidden], [logits], "head")
