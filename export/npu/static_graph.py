"""A DecoderSpec becomes graphs of fixed shape: what the compiler of the Hexagon NPU takes.

A stage is a run of consecutive layers, once for a piece of the prompt and once for a single token, over the same KV
cache. Hidden states of a stage are those the next one reads. The embedding and the head stay on the CPU, where the
looked-up rows and the int8 head are what the CPU graph has.

Names and shapes of `past_sequence_length` and `total_sequence_length` are onnxruntime-genai's
(src/models/input_ids.cpp); their values are GroupQueryAttention's `seqlens_k` and `total_sequence_length`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgephi.export.graph.attention import KvCache
from edgephi.export.graph.builder import MS, Emitter
from edgephi.export.graph.decoder import IR_VERSION, MS_OPSET
from edgephi.export.graph.head import logits as emit_logits
from edgephi.export.graph.mlp import mlp
from edgephi.export.graph.norms import normalize
from edgephi.export.spec import DecoderSpec
from edgephi.export.weights.layout import Layout, Recipe

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
    return emit_stage(StageEmitter(layout, recipe), spec, stage)


class StageEmitter(Emitter):
    """An emitter that also says what the KV cache holds between two runs: here, what attention takes."""

    @property
    def cached(self) -> ir.DataType:
        """Element type of the KV cache's inputs and outputs."""
        return self.float

    def open_cache(self, layer: int, cache: KvCache) -> KvCache:
        """What attention takes and gives, for the graph's inputs and outputs."""
        return cache

    def close_cache(self, layer: int, opened: KvCache, cache: KvCache) -> None:
        """Make the outputs from what attention gave."""


def emit_stage(emit: StageEmitter, spec: DecoderSpec, stage: Stage) -> ir.Model:
    """The layers of a stage, with linear layers and cache as the emitter writes them.

    Inputs: hidden states [1, tokens, hidden]; int32 [1, 1] index of the last token; int32 [1] length of the
    cache; keys and values [1, kv_heads, cache_rows, head_dim]. Outputs: hidden states, and the cache with the rows of
    the new tokens filled in. The last stage ends with the final norm.
    """
    import onnx_ir as ir

    hidden_shape = [1, stage.tokens, spec.hidden_size]
    hidden = emit.port(hidden_name(stage.first), hidden_shape)
    last = emit.port(LAST, [1, 1], ir.DataType.INT32)
    total = emit.port(TOTAL, [1], ir.DataType.INT32)
    inputs, outputs = [hidden, last, total], []
    for layer in stage.layers:
        cache = _kv_cache(emit, spec, layer, stage.cache_rows)
        inputs += [cache.past_key, cache.past_value]
        outputs += [cache.present_key, cache.present_value]
        base = f"/model/layers.{layer}"
        normed = normalize(emit, spec, f"layers.{layer}.input_norm", f"{base}/input_norm/LayerNorm", hidden)
        opened = emit.open_cache(layer, cache)
        attended = _attention(emit, spec, layer, normed, opened, (last, total))
        emit.close_cache(layer, opened, cache)
        hidden = emit.op("Add", f"{base}/attn/Add", [hidden, attended])
        normed = normalize(emit, spec, f"layers.{layer}.post_norm", f"{base}/post_norm/LayerNorm", hidden)
        fed = mlp(emit, spec, layer, normed)
        ends = layer + 1 == stage.last and stage.last < spec.layers
        target = emit.port(hidden_name(stage.last), hidden_shape) if ends else None
        hidden = emit.op("Add", f"{base}/mlp/Add", [hidden, fed], output=target)
    if stage.last == spec.layers:
        target = emit.port(hidden_name(stage.last), hidden_shape)
        hidden = normalize(emit, spec, "norm", "/model/final_norm/LayerNorm", hidden, output=target)
    return as_model(emit, stage.name, inputs, [hidden, *outputs])


def embedding_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe) -> ir.Model:
    """Token ids, int64 [1, length], become hidden states, float16 [1, length, hidden]."""
    import onnx_ir as ir

    emit = Emitter(layout, recipe)
    ids = emit.port(INPUT_IDS, [1, "length"], ir.DataType.INT64)
    hidden = emit.port(hidden_name(0), [1, "length", spec.hidden_size], ir.DataType.FLOAT16)
    rows = emit.scaled(
        "/model/embed_tokens", emit.lookup("/model/embed_tokens", "embed.weight", ids), spec.embedding_scale
    )
    emit.op("Cast", "/model/embed_tokens/Cast", [rows], {"to": int(ir.DataType.FLOAT16)}, output=hidden)
    return as_model(emit, "embedding", [ids], [hidden])


def head_graph(spec: DecoderSpec, layout: Layout, recipe: Recipe) -> ir.Model:
    """Normalized hidden states, float16 [1, length, hidden], become logits, float32 [1, length, vocabulary]."""
    import onnx_ir as ir

    emit = Emitter(layout, recipe)
    hidden = emit.port(hidden_name(spec.layers), [1, "length", spec.hidden_size], ir.DataType.FLOAT16)
    single = emit.op("Cast", "/lm_head/Cast", [hidden], {"to": int(emit.float)})
    logits = emit.port(LOGITS, [1, "length", spec.vocabulary_size])
    emit_logits(emit, spec, single, logits)
    return as_model(emit, "head", [hidden], [logits])


def _kv_cache(emit: StageEmitter, spec: DecoderSpec, layer: int, rows: int) -> KvCache:
    shape = [1, spec.kv_heads, rows, spec.head_dim]
    return KvCache(
        past_key=emit.port(f"past_key_values.{layer}.key", shape, emit.cached),
        past_value=emit.port(f"past_key_values.{layer}.value", shape, emit.cached),
        present_key=emit.port(f"present.{layer}.key", shape, emit.cached),
        present_value=emit.port(f"present.{layer}.value", shape, emit.cached),
    )


def _attention(
    emit: Emitter, spec: DecoderSpec, layer: int, normed: ir.Value, cache: KvCache, lengths: tuple[ir.Value, ir.Value]
) -> ir.Value:
    """GroupQueryAttention with rotary and KV cache in it; the NPU takes no other attributes than these."""
    base = f"/model/layers.{layer}/attn"
    qkv = emit.linear(f"{base}/qkv_proj", normed, f"layers.{layer}.qkv.weight")
    attributes: Mapping[str, int | float] = {
        "num_heads": spec.heads,
        "kv_num_heads": spec.kv_heads,
        "scale": float(spec.head_dim**-0.5) if spec.attention_scale is None else spec.attention_scale,
        "do_rotary": 1,
    }
    tables = [emit.vector("cos_cache"), emit.vector("sin_cache")]
    inputs = [qkv, None, None, cache.past_key, cache.past_value, *lengths, *tables]
    name = f"{base}/GroupQueryAttention"
    attended = emit.value(f"{name}/output_0")
    emit.node("GroupQueryAttention", name, inputs, [attended, cache.present_key, cache.present_value], attributes, MS)
    return emit.linear(f"{base}/o_proj", attended, f"layers.{layer}.o.weight")


def as_model(emit: Emitter, name: str, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    import onnx_ir as ir

    graph = ir.Graph(
        inputs=inputs,
        outputs=outputs,
        nodes=emit.nodes,
        initializers=list(emit.initializers.values()),
        opset_imports={"": emit.opset, MS: MS_OPSET},
        name=name,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgephi")
