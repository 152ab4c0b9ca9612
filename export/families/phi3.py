"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: everything published as Phi3ForCausalLM.

Source: Abdin et al. 2024, "Phi-3 Technical Report"; transformers' Phi3Config for the keys.
"""

from __future__ import annotations

from dataclasses import replace

from edgephi.export.checkpoint.config import Config
from edgephi.export.checkpoint.gguf_rope import PHI3_FIRST_CONTEXT
from edgephi.export.families.longrope import ropes_from_config
from edgephi.export.families.naming import Claims
from edgephi.export.families.rope import scaling_section
from edgephi.export.families.sizes import expect_activation, plain_decoder, read_sizes, read_window
from edgephi.export.spec import Architecture, Checkpoint, DecoderSpec


def describe(checkpoint: Checkpoint) -> Architecture:
    """Read the configuration and claim the tensors of a Phi3ForCausalLM."""
    spec = read_config(Config(checkpoint.config, checkpoint.config_where))
    claims = Claims(checkpoint.tensors)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    query, kv = spec.query_size, spec.kv_size
    spec = claims.claim_embedding(spec)
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        claims.claim(f"{ours}.input_norm.weight", "vector", [(f"{theirs}.input_layernorm.weight", (hidden,))])
        _claim_stacked(claims, f"{ours}.qkv", f"{theirs}.self_attn", "qkv", (query, kv, kv), hidden)
        claims.claim(f"{ours}.o.weight", "linear", [(f"{theirs}.self_attn.o_proj.weight", (hidden, spec.query_size))])
        claims.claim(f"{ours}.post_norm.weight", "vector", [(f"{theirs}.post_attention_layernorm.weight", (hidden,))])
        _claim_stacked(claims, f"{ours}.gate_up", f"{theirs}.mlp", "gate_up", (inner, inner), hidden)
        claims.claim(f"{ours}.down.weight", "linear", [(f"{theirs}.mlp.down_proj.weight", (hidden, inner))])
    claims.claim("norm.weight", "vector", [("model.norm.weight", (hidden,))])
    claims.claim_head(spec)
    return Architecture(spec, claims.finish())


def _claim_stacked(claims: Claims, ours: str, block: str, fused: str, rows: tuple[int, ...], columns: int) -> None:
    """Projections that lie in one tensor as published, or one by one where a fine-tuning tool took them apart."""
    names = ("q", "k", "v") if fused == "qkv" else ("gate", "up")
    parts = [(f"{block}.{fused}_proj.weight", (sum(rows), columns))]
    if not claims.has(parts[0][0]) and claims.has(f"{block}.{names[0]}_proj.weight"):
        parts = [(f"{block}.{name}_proj.weight", (size, columns)) for name, size in zip(names, rows, strict=True)]
    claims.claim(f"{ours}.weight", "linear", parts)


def read_config(config: Config) -> DecoderSpec:
    """Phi3Config, of transformers 4 or 5, as a description of the decoder."""
    expect_activation(config, "silu")
    config.expect("attention_bias", False)
    config.expect("mlp_bias", False)
    config.expect("lm_head_bias", False)
    sizes = read_sizes(config)
    context = config.integer("max_position_embeddings")
    scaling = scaling_section(config)
    if scaling is not None and not config.has("original_max_position_embeddings"):
        # transformers reads the key at the top level only, and takes the first Phi-3's where it is missing
        scaling.expect("original_max_position_embeddings", PHI3_FIRST_CONTEXT)
    rope, long_rope = ropes_from_config(config, sizes.head_dim, context, reads_mscale=False)
    spec = plain_decoder(
        "phi3",
        sizes,
        context_length=context,
        norm_epsilon=config.positive("rms_norm_eps", 1e-5),
        rope=rope,
        tied_embedding=config.boolean("tie_word_embeddings", False),
    )
    return replace(
        spec,
        sliding_window=read_window(config, context),
        long_rope=long_rope,
    )
