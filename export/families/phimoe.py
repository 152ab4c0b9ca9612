"""Phi-3.5-MoE and the SlimMoE models distilled from it: everything published as PhiMoEForCausalLM.

The names of two keys mislead: all norms are LayerNorm with a bias, and `rms_norm_eps` is their epsilon;
`router_jitter_noise` is no noise outside of training but the reach of the sparse mixer.
Source: Abdin et al. 2024, "Phi-3 Technical Report"; Li et al. 2025, "SlimMoE"; transformers' PhimoeConfig for the keys.
"""

from __future__ import annotations

from dataclasses import replace

from edgephi.export.checkpoint.config import Config
from edgephi.export.families.longrope import ropes_from_config
from edgephi.export.families.naming import Claims
from edgephi.export.families.rope import DEFAULTS, ORIGINAL, scaling_section, stated_once
from edgephi.export.families.sizes import expect_activation, plain_decoder, read_sizes, read_window
from edgephi.export.spec import EXPERTS_PER_TOKEN, Architecture, Checkpoint, DecoderSpec, Experts

MAX_EXPERTS = 256


def describe(checkpoint: Checkpoint) -> Architecture:
    """Read the configuration and claim the tensors of a PhiMoEForCausalLM."""
    config = Config(checkpoint.config, checkpoint.config_where)
    spec = read_config(config)
    assert spec.experts is not None
    experts = spec.experts.count
    claims = Claims(checkpoint.tensors)
    hidden, inner, query, kv = spec.hidden_size, spec.intermediate_size, spec.query_size, spec.kv_size
    spec = claims.claim_embedding(spec)
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        qkv = [(f"{theirs}.self_attn.{x}_proj", (size, hidden)) for x, size in (("q", query), ("k", kv), ("v", kv))]
        claims.claim_layer_norm(f"{ours}.input_norm", f"{theirs}.input_layernorm", hidden)
        claims.claim_linear(f"{ours}.qkv", qkv, bias=spec.qkv_bias)
        claims.claim_linear(f"{ours}.o", [(f"{theirs}.self_attn.o_proj", (hidden, query))], bias=spec.output_bias)
        claims.claim_layer_norm(f"{ours}.post_norm", f"{theirs}.post_attention_layernorm", hidden)
        block = f"{theirs}.block_sparse_moe"
        claims.claim(f"{ours}.router.weight", "router", [(f"{block}.gate.weight", (experts, hidden))])
        for expert in range(experts):
            # w1 is the gate, w3 the up projection
            names = [f"{block}.experts.{expert}.{x}.weight" for x in ("w1", "w3")]
            claims.claim_alternating(f"{ours}.experts.{expert}.gate_up.weight", "expert", names, (inner, hidden))
            down = f"{block}.experts.{expert}.w2.weight"
            claims.claim(f"{ours}.experts.{expert}.down.weight", "expert", [(down, (hidden, inner))])
    claims.claim_layer_norm("norm", "model.norm", hidden)
    claims.claim_head(spec)
    if config.boolean("lm_head_bias", False):
        claims.claim("head.bias", "vector", [("lm_head.bias", (spec.vocabulary_size,))])
    return Architecture(spec, claims.finish())


def read_config(config: Config) -> DecoderSpec:
    """PhimoeConfig, of transformers 4 or 5, as a description of the decoder."""
    expect_activation(config, "silu")
    config.expect("num_experts_per_tok", EXPERTS_PER_TOKEN)
    stated_once(config, "partial_rotary_factor").expect("partial_rotary_factor", 1.0)
    sizes = read_sizes(config)
    context = config.integer("max_position_embeddings")
    jitter = config.number("router_jitter_noise", 0.01)
    if not 0 <= jitter < 1:
        raise config.refusal("router_jitter_noise", jitter, "a fraction is needed")
    if not stated_once(config, "rope_theta").has("rope_theta"):
        config = Config({**config.values, "rope_theta": DEFAULTS["phimoe", "rope_theta"]}, config.where)
    if (scaling := scaling_section(config)) is not None and scaling.has("short_factor"):
        # transformers 4 decides by the section's length which factor scales the angles, and 5 by the top level's
        stated_once(config, ORIGINAL)
    rope, long_rope = ropes_from_config(config, sizes.head_dim, context)
    bias = config.boolean("attention_bias", False)
    spec = plain_decoder(
        "phimoe",
        sizes,
        context_length=context,
        norm_epsilon=config.positive("rms_norm_eps", 1e-5),
        rope=rope,
        tied_embedding=config.boolean("tie_word_embeddings", False),
    )
    return replace(
        spec,
        sliding_window=read_window(config, context),
        qkv_bias=bias,
        output_bias=bias,
        norm="layer",
        mlp="experts",
        experts=Experts(count=config.integer("num_local_experts", 16, at_most=MAX_EXPERTS), jitter=jitter),
        long_rope=long_rope,
    )
