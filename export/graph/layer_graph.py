"""One decoder layer, or the end of a decoder, as a model of its own: hidden states in, hidden states or logits out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from edgephi.export.graph.attention import kv_cache
from edgephi.export.graph.builder import GraphBuilder
from edgephi.export.graph.head import head_inputs
from edgephi.export.graph.head import logits as emit_logits
from edgephi.export.graph.layer import decoder_layers
from edgephi.export.graph.norms import normalize
from edgephi.export.graph.positions import positions
from edgephi.export.spec import HEAD, Architecture, DecoderSpec, Weight
from edgephi.export.weights.layout import Layout
from edgephi.export.weights.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

HIDDEN_IN, HIDDEN_OUT, HEAD_IN, LOGITS, MASK = "hidden_in", "hidden_out", "head_in", "logits", "attention_mask"


def single_layer(architecture: Architecture, layer: int, longest: int) -> Architecture:
    """Layer number `layer`, counted from 0, as the only one of a model for sequences of up to `longest` tokens.

    Its weights are called `layers.0. …`. Embedding, last norm and head are not part of it. The rotary tables are as
    long as `longest` asks for, not as the context; a model with two ropes keeps both.
    """
    spec, prefix = architecture.spec, f"layers.{layer}."
    sparse = spec.block_sparse
    if sparse is not None:
        sparse = replace(sparse, dense_every=None) if sparse.covers(layer) else None
    weights = {
        f"layers.0.{name.removeprefix(prefix)}": weight
        for name, weight in architecture.weights.items()
        if name.startswith(prefix)
    }
    return Architecture(replace(spec, layers=1, context_length=longest, block_sparse=sparse), _named(weights))


def decoder_end(architecture: Architecture) -> Architecture:
    """The last norm and the head, as a model without layers."""
    ends = ("norm", "head_input", "head")
    names = [f"{end}.{kind}" for end in ends for kind in ("weight", "bias")]
    if architecture.spec.tied_embedding:
        names.append("embed.weight")
    weights = {name: architecture.weights[name] for name in names if name in architecture.weights}
    return Architecture(replace(architecture.spec, layers=0, context_length=1, long_rope=None), weights)


def layer_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe) -> ir.Model:
    """The graph of a `single_layer`: HIDDEN_IN and HIDDEN_OUT [batch, length, hidden], MASK int64 [batch, length].

    It has an (empty) KV cache as inputs, because the operator asks for one, and gives none back.
    """
    emit = GraphBuilder(layout, recipe)
    return emit.model(*emit_layer(emit, spec))


def emit_layer(emit: GraphBuilder, spec: DecoderSpec) -> tuple[list[ir.Value], list[ir.Value]]:
    """Write the nodes of a `single_layer`; returns inputs and outputs as `layer_graph` describes them."""
    import onnx_ir as ir

    hidden = emit.port(HIDDEN_IN, ["batch_size", "sequence_length", spec.hidden_size])
    mask = emit.port(MASK, ["batch_size", "total_sequence_length"], ir.DataType.INT64)
    cache = kv_cache(emit, spec, 0)
    # of the token ids only the length is read, which hidden states have on the same axis
    total, update = decoder_layers(emit, spec, hidden, {0: cache}, positions(emit, spec, hidden, mask))
    output = emit.port(HIDDEN_OUT, ["batch_size", "sequence_length", spec.hidden_size])
    emit.op("Add", "/model/layers.0/residual/Add", [total, update], output=output)
    return [hidden, mask, cache.past_key, cache.past_value], [output]


def end_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe) -> ir.Model:
    """The graph of a `decoder_end`: HIDDEN_IN [batch, length, hidden] to LOGITS [batch, length, vocabulary]."""
    emit = GraphBuilder(layout, recipe)
    hidden = emit.port(HIDDEN_IN, ["batch_size", "sequence_length", spec.hidden_size])
    logits = emit.port(LOGITS, ["batch_size", "sequence_length", spec.vocabulary_size])
    emit_logits(emit, spec, normalize(emit, spec, "norm", "/model/final_norm/LayerNorm", hidden), logits)
    return emit.model([hidden], [logits])


def before_head(architecture: Architecture) -> Architecture:
    """A `decoder_end` without the head."""
    end = decoder_end(architecture)
    weights = {name: weight for name, weight in end.weights.items() if name not in (HEAD, "embed.weight")}
    return replace(end, weights=weights)


def before_head_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe) -> ir.Model:
    """The graph of `before_head`: HIDDEN_IN [batch, length, hidden] to HEAD_IN, which is what the head multiplies."""
    emit = GraphBuilder(layout, recipe)
    hidden = emit.port(HIDDEN_IN, ["batch_size", "sequence_length", spec.hidden_size])
    given = head_inputs(emit, spec, normalize(emit, spec, "norm", "/model/final_norm/LayerNorm", hidden))
    output = emit.port(HEAD_IN, ["batch_size", "sequence_length", "head_columns"])
    emit.op("Identity", "/lm_head/input/Identity", [given], output=output)
    return emit.model([hidden], [output])


def _named(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {name: replace(weight, name=name) for name, weight in weights.items()}
