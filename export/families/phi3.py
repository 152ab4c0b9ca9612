"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: everything published as Phi3ForCausalLM.

Source: Abdin et al. 2024, "Phi-3 Technical Report"; transformers' Phi3Config for the keys.
"""

from __future__ import annotations

from dataclasses import replace

from edgephi.export.config import Config
from edgephi.export.families.naming import Claims
from edgephi.export.families.sizes import plain_decoder, read_sizes, read_window
from edgephi.export.longrope import ropes_from_config
from edgephi.export.spec import Architecture, Checkpoint, DecoderSpec


def describe(checkpoint: Checkpoint) -> Architecture:
    """Read the configuration and claim the tensors of a Phi3ForCausalLM."""
    spec = read_config(Config(checkpoint.config, checkpoint.config_where))
    claims = Claims(checkpoint.tensors)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    qkv_rows = spec.query_size + 2 * spec.kv_size
    claims.claim("embed.weight", "embedding", [("model.embed_tokens.weight", (spec.vocabulary_size, hidden))])
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        claims.claim(f"{ours}.input_norm.weight", "vector", [(f"{theirs}.input_layernorm.weight", (hidden,))])
        claims.claim(f"{ours}.qkv.weight", "linear", [(f"{theirs}.self_attn.qkv_proj.weight", (qkv_rows, hidden))])
        claims.claim(f"{ours}.o.weight", "linear", [(f"{theirs}.self_attn.o_proj.weight", (hidden, spec.query_size))])
        claims.claim(f"{ours}.post_norm.weight", "vector", [(f"{theirs}.post_attention_layernorm.weight", (hidden,))])
        claims.claim(f"{ours}.gate_up.weight", "linear", [(f"{theirs}.mlp.gate_up_proj.weight", (2 * inner, hidden))])
        claims.claim(f"{ours}.down.weight", "linear", [(f"{theirs}.mlp.down_proj.weight", (hidden, inner))])
    claims.claim("norm.weight", "vector", [("model.norm.weight", (hidden,))])
    claims.claim_head(spec)
    return Architecture(spec, claims.finish())


def read_config(config: Config) -> DecoderSpec:
    """Phi3Config, of transformers 4 or 5, as a description of the decoder."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    config.expect("mlp_bias", False)
    config.expect("lm_head_bias", False)
    sizes = read_sizes(config)
    context = config.integer("max_position_embeddings")
    rope, long_rope = ropes_from_config(config, sizes.head_dim, context)
    spec = plain_decoder(
        "phi3",
        sizes,
        context_length=context,
        norm_epsilon=config.number("rms_norm_eps", 1e-5),
        rope=rope,
        tied_embedding=config.boolean("tie_word_embeddings", False),
    )
    return replace(
        spec,
        sliding_window=read_window(config, context),
        long_rope=long_rope,
    )
