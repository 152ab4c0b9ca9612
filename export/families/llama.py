"""Llama (1 to 3.x, SmolLM2 and other models published as LlamaForCausalLM).

The block is Phi-3's with q, k, v and gate, up kept apart; here they are stacked, so that one graph serves both.
Source: Touvron et al. 2023, "LLaMA"; transformers' LlamaConfig for the keys.
"""

from __future__ import annotations

from dataclasses import replace

from edgephi.export.checkpoint.config import Config
from edgephi.export.families.naming import Claims
from edgephi.export.families.rope import rope_from_config, stated_once
from edgephi.export.families.sizes import DEFAULT_CONTEXT, expect_activation, plain_decoder, read_sizes
from edgephi.export.spec import Architecture, Checkpoint, DecoderSpec


def describe(checkpoint: Checkpoint) -> Architecture:
    """Read the configuration and claim the tensors of a LlamaForCausalLM."""
    spec = read_config(Config(checkpoint.config, checkpoint.config_where))
    claims = Claims(checkpoint.tensors)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    spec = claims.claim_embedding(spec)
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        query, kv = spec.query_size, spec.kv_size
        qkv = [(f"{theirs}.self_attn.{x}_proj", (size, hidden)) for x, size in (("q", query), ("k", kv), ("v", kv))]
        gate_up = [(f"{theirs}.mlp.{x}_proj", (inner, hidden)) for x in ("gate", "up")]
        claims.claim(f"{ours}.input_norm.weight", "vector", [(f"{theirs}.input_layernorm.weight", (hidden,))])
        claims.claim_linear(f"{ours}.qkv", qkv, bias=spec.qkv_bias)
        claims.claim_linear(f"{ours}.o", [(f"{theirs}.self_attn.o_proj", (hidden, query))], bias=spec.output_bias)
        claims.claim(f"{ours}.post_norm.weight", "vector", [(f"{theirs}.post_attention_layernorm.weight", (hidden,))])
        claims.claim_linear(f"{ours}.gate_up", gate_up, bias=spec.mlp_bias)
        claims.claim_linear(f"{ours}.down", [(f"{theirs}.mlp.down_proj", (hidden, inner))], bias=spec.mlp_bias)
    claims.claim("norm.weight", "vector", [("model.norm.weight", (hidden,))])
    claims.claim_head(spec)
    return Architecture(spec, claims.finish())


def read_config(config: Config) -> DecoderSpec:
    """LlamaConfig, of transformers 4 or 5, as a description of the decoder."""
    expect_activation(config, "silu")
    # transformers rotates whole heads whatever this says, or stops over it, depending on the rope type
    stated_once(config, "partial_rotary_factor").expect("partial_rotary_factor", 1.0)
    sizes = read_sizes(config)
    bias = config.boolean("attention_bias", False)
    spec = plain_decoder(
        "llama",
        sizes,
        context_length=config.integer("max_position_embeddings", DEFAULT_CONTEXT),
        norm_epsilon=config.positive("rms_norm_eps", 1e-6),
        rope=rope_from_config(config, sizes.head_dim),
        tied_embedding=config.boolean("tie_word_embeddings", False),
    )
    return replace(
        spec,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )
