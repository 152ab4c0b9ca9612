"""Phi-3-small (8k and 128k): everything published as Phi3SmallForCausalLM.

It differs from Phi-3 in most of its parts: LayerNorm with biases, a clamped GEGLU (`export/graph/mlp.py`),
block-sparse attention in every second layer (`export/graph/block_sparse.py`), muP scales, and q, k, v interleaved by
group of heads. transformers has no class for it; the checkpoint carries its own.
Source: Abdin et al. 2024, "Phi-3 Technical Report"; microsoft/Phi-3-small-8k-instruct, configuration_phi3_small.py and
modeling_phi3_small.py; Yang et al. 2022, "Tensor Programs V", for muP.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from edgephi.export.checkpoint.config import Config
from edgephi.export.families.longrope import ropes_from_config
from edgephi.export.families.naming import Claims
from edgephi.export.families.rope import ORIGINAL, scaling_section, stated_once
from edgephi.export.families.sizes import MAX_LAYERS, Sizes, plain_decoder, read_sizes
from edgephi.export.spec import Architecture, BlockSparse, Checkpoint, DecoderSpec

UNUSED_TOKENS = (100256, 100258, 100259, 100260, 100264, 100265, *range(100267, 100352))
"""`dummy_token_indices` as the published configuration class computes it from the tokenizer; config.json has none."""


def describe(checkpoint: Checkpoint) -> Architecture:
    """Read the configuration and claim the tensors of a Phi3SmallForCausalLM."""
    spec = read_config(Config(checkpoint.config, checkpoint.config_where))
    claims = Claims(checkpoint.tensors)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    spec = claims.claim_embedding(spec)
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        claims.claim_layer_norm(f"{ours}.input_norm", f"{theirs}.input_layernorm", hidden)
        qkv, rows = f"{theirs}.self_attn.query_key_value", spec.query_size + 2 * spec.kv_size
        claims.claim_rows(f"{ours}.qkv.weight", "linear", f"{qkv}.weight", (rows, hidden), _qkv_rows(spec))
        claims.claim_rows(f"{ours}.qkv.bias", "vector", f"{qkv}.bias", (rows,), _qkv_rows(spec))
        claims.claim_linear(f"{ours}.o", [(f"{theirs}.self_attn.dense", (hidden, spec.query_size))])
        claims.claim_layer_norm(f"{ours}.post_norm", f"{theirs}.post_attention_layernorm", hidden)
        claims.claim_linear(f"{ours}.up", [(f"{theirs}.mlp.up_proj", (2 * inner, hidden))])
        claims.claim_linear(f"{ours}.down", [(f"{theirs}.mlp.down_proj", (hidden, inner))])
    claims.claim_layer_norm("norm", "model.final_layernorm", hidden)
    claims.claim_head(spec)
    return Architecture(spec, claims.finish())


def _qkv_rows(spec: DecoderSpec) -> list[tuple[int, int]]:
    """All queries, all keys, all values, where the checkpoint has for each KV head its queries, its key, its value."""
    queries, size = spec.heads // spec.kv_heads, spec.head_dim
    starts = [group * (queries + 2) * size for group in range(spec.kv_heads)]
    spans = ((0, queries), (queries, queries + 1), (queries + 1, queries + 2))
    return [(start + first * size, start + last * size) for first, last in spans for start in starts]


def read_config(config: Config) -> DecoderSpec:
    """Phi3SmallConfig as a description of the decoder."""
    config.expect("hidden_act", "gegelu")
    config.expect("ff_dim_multiplier", None)
    config.expect("rope_position_scale", 1.0)
    inner, theta = config.integer("ff_intermediate_size"), config.positive("rope_embedding_base")
    config.expect("intermediate_size", inner)
    config.expect("rope_theta", theta)
    common = Config({**config.values, "intermediate_size": inner, "rope_theta": theta}, config.where)
    sizes = read_sizes(common)
    context = config.integer("max_position_embeddings")
    if (scaling := scaling_section(common)) is not None and scaling.has("short_factor"):
        stated_once(common, ORIGINAL)  # the published code reads the section's, other programs the top level's
    rope, long_rope = ropes_from_config(common, sizes.head_dim, context)
    width = config.positive("mup_width_multiplier")
    scale = config.positive("mup_attn_multiplier") / sizes.head_dim if config.boolean("mup_use_scaling") else None
    spec = plain_decoder(
        "phi3small",
        sizes,
        context_length=context,
        norm_epsilon=config.positive("layer_norm_epsilon"),
        rope=rope,
        # the checkpoints have no head, and transformers ties where a configuration says nothing
        tied_embedding=config.boolean("tie_word_embeddings", True),
    )
    return replace(
        spec,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm="layer",
        mlp="gegelu",
        gegelu_limit=config.positive("gegelu_limit") if config.has("gegelu_limit") else None,
        long_rope=long_rope,
        block_sparse=_block_sparse(config, sizes),
        attention_scale=scale,
        embedding_scale=config.positive("mup_embedding_multiplier"),
        head_scale=1 / width,
        suppressed_tokens=_suppressed_tokens(config, sizes.vocabulary),
    )


def _block_sparse(config: Config, sizes: Sizes) -> BlockSparse | None:
    """The pattern; None when every layer is dense."""
    dense_every = None
    if config.has("dense_attention_every_n_layers"):
        dense_every = config.integer("dense_attention_every_n_layers", at_most=MAX_LAYERS)
    stride = config.integer("blocksparse_vert_stride", at_most=1 << 16)
    # each head's strided blocks lie one step before those of the head in front of it; heads repeat after `period`
    step = 0 if config.boolean("blocksparse_homo_head_pattern") else max(1, stride // sizes.heads)
    period = stride // gcd(stride, step)
    count = period if sizes.heads % period == 0 else sizes.heads
    sparse = BlockSparse(
        block_size=config.integer("blocksparse_block_size", at_most=1 << 16),
        local_blocks=config.integer("blocksparse_num_local_blocks", at_most=1 << 16),
        stride=stride,
        shifts=tuple(head * step % stride for head in range(count)),
        dense_every=dense_every,
    )
    return sparse if any(sparse.covers(layer) for layer in range(sizes.layers)) else None


def _suppressed_tokens(config: Config, vocabulary: int) -> tuple[int, ...]:
    key = "dummy_token_indices"
    tokens = config.values.get(key)
    if tokens is None:
        if vocabulary <= UNUSED_TOKENS[-1]:
            raise config.refusal("vocab_size", vocabulary, f"without {key} it must exceed {UNUSED_TOKENS[-1]}")
        return UNUSED_TOKENS
    if not isinstance(tokens, list):
        raise config.refusal(key, tokens, "a list of token ids is needed")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise config.refusal(key, token, f"ids below {vocabulary:,} are needed")
    return tuple(sorted(set(tokens)))
