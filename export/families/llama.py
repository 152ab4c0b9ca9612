"""Llama (1 to 3.x, SmolLM2 and other models published as LlamaForCausalLM).

The block is Phi-3's with q, k, v and gate, up kept apart; here they are stacked, so that one graph serves both.
Source: Touvron et al. 2023, "LLaMA"; transformers' LlamaConfig for the keys.
"""

from __future__ import annotations

from dataclasses import replace

from edgephi.export.config import Config
from edgephi.export.families.naming import Claims
from edgephi.export.families.sizes import plain_decoder, read_sizes
from edgephi.export.rope import rope_from_config
from edgephi.export.spec import Architecture, Checkpoint, DecoderSpec


def describe(checkpoint: Checkpoint) -> Architecture:
    """Read the configuration and claim the tensors of a LlamaForCausalLM."""
    spec = read_config(Config(checkpoint.config, checkpoint.config_where))
    claims = Claims(checkpoint.tensors)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    claims.claim("embed.weight", "embedding", [("model.embed_tokens.weight", (spec.vocabulary_size, hidden))])
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        query, kv = spec.query_size, spec.kv_size
        qkv = [(f"{theirs}.self_attn.{x}_proj", size) for x, size in (("q", query), ("k", kv), ("v", kv))]
        gate_up = [(f"{theirs}.mlp.{x}_proj", inner) for x in ("gate", "up")]
        claims.claim(f"{ours}.input_norm.weight", "vector", [(f"{theirs}.input_layernorm.weight", (hidden,))])
        claims.claim(f"{ours}.qkv.weight", "linear", [(f"{name}.weight", (size, hidden)) for name, size in qkv])
        claims.claim(f"{ours}.o.weight", "linear", [(f"{theirs}.self_attn.o_proj.weight", (hidden, query))])
        claims.claim(f"{ours}.post_norm.weight", "vector", [(f"{theirs}.post_attention_layernorm.weight", (hidden,))])
        claims.claim(f"{ours}.gate_up.weight", "linear", [(f"{name}.weight", (size, hidden)) for name, size in gate_up])
        claims.claim(f"{ours}.down.weight", "linear", [(f"{theirs}.mlp.down_proj.weight", (hidden, inner))])
        if spec.qkv_bias:
            claims.claim(f"{ours}.qkv.bias", "vector", [(f"{name}.bias", (size,)) for name, size in qkv])
        if spec.output_bias:
            claims.claim(f"{ours}.o.bias", "vector", [(f"{theirs}.self_attn.o_proj.bias", (hidden,))])
        if spec.mlp_bias:
            claims.claim(f"{ours}.gate_up.bias", "vector", [(f"{name}.bias", (size,)) for name, size in gate_up])
            claims.claim(f"{ours}.down.bias", "vector", [(f"{theirs}.mlp.down_proj.bias", (hidden,))])
    claims.claim("norm.weight", "vector", [("model.norm.weight", (hidden,))])
    if spec.tied_embedding:
        claims.ignore("lm_head.weight")
    else:
        claims.claim("head.weight", "head", [("lm_head.weight", (spec.vocabulary_size, hidden))])
    return Architecture(spec, claims.finish())


def read_config(config: Config) -> DecoderSpec:
    """LlamaConfig, of transformers 4 or 5, as a description of the decoder."""
    config.expect("hidden_act", "silu")
    config.expect("pretraining_tp", 1)
    sizes = read_sizes(config)
    bias = config.boolean("attention_bias", False)
    spec = plain_decoder(
        "llama",
        sizes,
        context_length=config.integer("max_position_embeddings"),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        rope=rope_from_config(config, sizes.head_dim),
        tied_embedding=config.boolean("tie_word_embeddings", False),
    )
    return replace(
        spec,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )
