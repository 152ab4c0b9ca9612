"""Phi-3-small in NumPy float64, written from its published description: the reference of `test_phi3small.py`.

No KV cache, no fused operators, and the mask of every head as a dense matrix.
Source: microsoft/Phi-3-small-8k-instruct, modeling_phi3_small.py and its block-sparse mask; Abdin et al. 2024.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, NDArray[np.float32]]
Config = dict[str, Any]


def random_weights(config: Config, seed: int) -> Weights:
    """A checkpoint's tensors under their published names, scaled so that no part of the model drowns in another."""
    rng = np.random.default_rng(seed)
    hidden, inner, heads, kv = (
        config[key] for key in ("hidden_size", "ff_intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    head_dim = hidden // heads

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> Weights:
        weight = gain * rng.standard_normal((rows, columns)) / np.sqrt(columns)
        return {f"{name}.weight": weight, f"{name}.bias": 0.3 * rng.standard_normal(rows)}

    def norm(name: str) -> Weights:
        return {f"{name}.weight": rng.uniform(0.5, 1.5, hidden), f"{name}.bias": 0.3 * rng.standard_normal(hidden)}

    weights = {"model.embed_tokens.weight": 0.1 * rng.standard_normal((config["vocab_size"], hidden))}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        weights |= norm(f"{name}.input_layernorm") | norm(f"{name}.post_attention_layernorm")
        weights |= linear(f"{name}.self_attn.query_key_value", (heads + 2 * kv) * head_dim, hidden, 2.0)
        weights |= linear(f"{name}.self_attn.dense", hidden, hidden) | linear(f"{name}.mlp.up_proj", 2 * inner, hidden)
        weights |= linear(f"{name}.mlp.down_proj", hidden, inner)
    weights |= norm("model.final_layernorm")
    return {name: tensor.astype(np.float32) for name, tensor in weights.items()}


def forward(config: Config, weights: Weights, token_ids: NDArray[np.int64]) -> Array:
    """Logits [length, vocabulary] of one sequence of token ids [length]; unused tokens at the lowest float32."""
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    x = w["model.embed_tokens.weight"][token_ids] * config["mup_embedding_multiplier"]
    epsilon = config["layer_norm_epsilon"]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        x = x + attention(config, w, layer, layer_norm(w, f"{name}.input_layernorm", x, epsilon))
        up = linear(w, f"{name}.mlp.up_proj", layer_norm(w, f"{name}.post_attention_layernorm", x, epsilon))
        x = x + linear(w, f"{name}.mlp.down_proj", gegelu(up, config["gegelu_limit"]))
    x = layer_norm(w, "model.final_layernorm", x, epsilon)
    logits = x @ w["model.embed_tokens.weight"].T / config["mup_width_multiplier"]
    logits[:, config["dummy_token_indices"]] = np.finfo(np.float32).min
    return logits


def linear(w: dict[str, Array], name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: dict[str, Array], name: str, x: Array, epsilon: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def gegelu(x: Array, limit: float) -> Array:
    gelu, gate = np.minimum(x[..., 0::2], limit), np.clip(x[..., 1::2], -limit, limit)
    return gelu / (1 + np.exp(-1.702 * gelu)) * (gate + 1)


def attention(config: Config, w: dict[str, Array], layer: int, x: Array) -> Array:
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, group, length = config["hidden_size"] // heads, heads // kv, len(x)
    name = f"model.layers.{layer}.self_attn"
    # one row of the projection: (q, …, q, k, v) of the first KV head, then of the next
    qkv = linear(w, f"{name}.query_key_value", x).reshape(length, kv, group + 2, head_dim)
    query = rotate(config, qkv[:, :, :group].reshape(length, heads, head_dim))
    key = rotate(config, qkv[:, :, group]).repeat(group, axis=1)
    value = qkv[:, :, group + 1].repeat(group, axis=1)
    norm = head_dim / config["mup_attn_multiplier"] if config["mup_use_scaling"] else np.sqrt(head_dim)
    scores = np.einsum("qhd,khd->hqk", query, key) / norm
    every = config["dense_attention_every_n_layers"]
    dense = every is not None and (layer + 1) % every == 0
    seen = np.tril(np.ones((length, length), bool)) & (dense or block_sparse_mask(config, length))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, value).reshape(length, heads * head_dim)
    return linear(w, f"{name}.dense", mixed)


def rotate(config: Config, x: Array) -> Array:
    """Rotary embedding of [length, heads, head_dim], LongRoPE's factors chosen by the whole length."""
    length, half = len(x), x.shape[-1] // 2
    wavelength = config["rope_embedding_base"] ** (np.arange(half) / half)
    scale, scaling = 1.0, config.get("rope_scaling")
    if scaling is not None:
        kind = "long" if length > scaling["original_max_position_embeddings"] else "short"
        wavelength, scale = wavelength * scaling[f"{kind}_factor"], scaling[f"{kind}_mscale"]
    angle = np.outer(np.arange(length), 1 / wavelength)[:, None]
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def block_sparse_mask(config: Config, length: int) -> NDArray[np.bool_]:
    """[heads, length, length] without causality: what a head looks at, block by block."""
    size, heads = config["blocksparse_block_size"], config["num_attention_heads"]
    local, stride = config["blocksparse_num_local_blocks"], config["blocksparse_vert_stride"]
    blocks = -(-length // size)
    step = 0 if config["blocksparse_homo_head_pattern"] else max(1, int(stride / heads))
    seen = np.zeros((heads, blocks, blocks), bool)
    for head in range(heads):
        for query in range(blocks):
            for key in range(query + 1):
                is_local, is_vertical = query - key < local, (key + head * step + 1) % stride == 0
                seen[head, query, key] = is_local or is_vertical
    return seen.repeat(size, axis=1).repeat(size, axis=2)[:, :length, :length]
