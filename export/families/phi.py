"""Phi-1, Phi-1.5 and Phi-2: everything published as PhiForCausalLM.

Attention and MLP stand side by side behind one LayerNorm; every linear layer has a bias, the head too.
Source: Gunasekar et al. 2023, "Textbooks Are All You Need"; Li et al. 2023, "Textbooks Are All You Need II";
transformers' PhiConfig for the keys.
"""

from __future__ import annotations

from dataclasses import replace

from edgephi.export.checkpoint.config import Config
from edgephi.export.families.naming import Claims
from edgephi.export.families.rope import DEFAULTS, rope_from_config, stated_once
from edgephi.export.families.sizes import DEFAULT_CONTEXT, expect_activation, plain_decoder, read_sizes
from edgephi.export.spec import Architecture, Checkpoint, DecoderSpec


def describe(checkpoint: Checkpoint) -> Architecture:
    """Read the configuration and claim the tensors of a PhiForCausalLM."""
    spec = read_config(Config(checkpoint.config, checkpoint.config_where))
    claims = Claims(checkpoint.tensors)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    spec = claims.claim_embedding(spec)
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        query, kv = spec.query_size, spec.kv_size
        qkv = [(f"{theirs}.self_attn.{x}_proj", (size, hidden)) for x, size in (("q", query), ("k", kv), ("v", kv))]
        claims.claim_layer_norm(f"{ours}.input_norm", f"{theirs}.input_layernorm", hidden)
        claims.claim_linear(f"{ours}.qkv", qkv)
        claims.claim_linear(f"{ours}.o", [(f"{theirs}.self_attn.dense", (hidden, query))])
        claims.claim_linear(f"{ours}.up", [(f"{theirs}.mlp.fc1", (inner, hidden))])
        claims.claim_linear(f"{ours}.down", [(f"{theirs}.mlp.fc2", (hidden, inner))])
    claims.claim_layer_norm("norm", "model.final_layernorm", hidden)
    claims.claim_head(spec)
    claims.claim("head.bias", "vector", [("lm_head.bias", (spec.vocabulary_size,))])
    return Architecture(spec, claims.finish())


def read_config(config: Config) -> DecoderSpec:
    """PhiConfig, of transformers 4 or 5, as a description of the decoder."""
    expect_activation(config, "gelu_new")
    config.expect("qk_layernorm", False)
    sizes = read_sizes(config)
    if not stated_once(config, "partial_rotary_factor").has("partial_rotary_factor"):
        config = Config(
            {**config.values, "partial_rotary_factor": DEFAULTS["phi", "partial_rotary_factor"]}, config.where
        )
    spec = plain_decoder(
        "phi",
        sizes,
        context_length=config.integer("max_position_embeddings", DEFAULT_CONTEXT),
        # not rms_norm_eps: this family has a key of its own
        norm_epsilon=config.positive("layer_norm_eps", 1e-5),
        rope=rope_from_config(config, sizes.head_dim),
        tied_embedding=config.boolean("tie_word_embeddings", False),
    )
    return replace(
        spec,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm="layer",
        mlp="gelu_tanh",
        parallel=True,
    )
