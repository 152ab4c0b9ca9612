"""Phi-1, Phi-1.5 and Phi-2: everything published as PhiForCausalLM.

Attention and MLP stand side by side behind one LayerNorm; every linear layer has a bias, the head too.
Source: Gunasekar et al. 2023, "Textbooks Are All You Need"; Li et al. 2023, "Textbooks Are All You Need II";
transformers' PhiConfig for the keys.
"""

from __future__ import annotations

from dataclasses import replace

from edgephi.export.config import Config
from edgephi.export.families.naming import Claims
from edgephi.export.families.sizes import plain_decoder, read_sizes
from edgephi.export.rope import rope_from_config
from edgephi.export.spec import Architecture, Checkpoint, DecoderSpec

DEFAULT_ROTARY_FACTOR = 0.5
"""PhiConfig's, unlike that of every other family."""


def describe(checkpoint: Checkpoint) -> Architecture:
    """Read the configuration and claim the tensors of a PhiForCausalLM."""
    spec = read_config(Config(checkpoint.config, checkpoint.config_where))
    claims = Claims(checkpoint.tensors)
    hidden, inner = spec.hidden_size, spec.intermediate_size

    def norm(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            claims.claim(f"{ours}.{kind}", "vector", [(f"{theirs}.{kind}", (hidden,))])

    def linear(ours: str, parts: list[tuple[str, int]], columns: int) -> None:
        claims.claim(f"{ours}.weight", "linear", [(f"{name}.weight", (rows, columns)) for name, rows in parts])
        claims.claim(f"{ours}.bias", "vector", [(f"{name}.bias", (rows,)) for name, rows in parts])

    claims.claim("embed.weight", "embedding", [("model.embed_tokens.weight", (spec.vocabulary_size, hidden))])
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        projections = (("q", spec.query_size), ("k", spec.kv_size), ("v", spec.kv_size))
        norm(f"{ours}.input_norm", f"{theirs}.input_layernorm")
        linear(f"{ours}.qkv", [(f"{theirs}.self_attn.{x}_proj", size) for x, size in projections], hidden)
        linear(f"{ours}.o", [(f"{theirs}.self_attn.dense", hidden)], spec.query_size)
        linear(f"{ours}.up", [(f"{theirs}.mlp.fc1", inner)], hidden)
        linear(f"{ours}.down", [(f"{theirs}.mlp.fc2", hidden)], inner)
    norm("norm", "model.final_layernorm")
    if spec.tied_embedding:
        claims.ignore("lm_head.weight")
    else:
        claims.claim("head.weight", "head", [("lm_head.weight", (spec.vocabulary_size, hidden))])
    claims.claim("head.bias", "vector", [("lm_head.bias", (spec.vocabulary_size,))])
    return Architecture(spec, claims.finish())


def read_config(config: Config) -> DecoderSpec:
    """PhiConfig, of transformers 4 or 5, as a description of the decoder."""
    config.expect("hidden_act", "gelu_new")
    config.expect("qk_layernorm", False)
    sizes = read_sizes(config)
    if not config.has("partial_rotary_factor"):
        config = Config({**config.values, "partial_rotary_factor": DEFAULT_ROTARY_FACTOR}, config.where)
    spec = plain_decoder(
        "phi",
        sizes,
        context_length=config.integer("max_position_embeddings"),
        # not rms_norm_eps: this family has a key of its own
        norm_epsilon=config.number("layer_norm_eps", 1e-5),
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
