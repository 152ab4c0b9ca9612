"""Tiny Phi checkpoints with a tokenizer, for whole exports: random weights, so that every token matters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

PHI_3: dict[str, object] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "sliding_window": 2047,
    "rope_theta": 10000.0,
}
"""The shape of Phi-3-mini: as many key-value heads as heads, whole heads rotated, a head of its own."""

PHI_4_MINI: dict[str, object] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 1024,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8},
}
"""The shape of Phi-4-mini: three queries to a key, a part of every head rotated, LongRoPE, the embedding as head."""

VOCABULARY, TOKENS = 64, 60
FIRST = 3
"""The first token that stands for a character."""


ASCII_VOCABULARY = 384
"""Of a byte-level tokenizer that writes all text: the special tokens, 256 bytes and MERGES; the rest is padding."""
MERGES = ('{ "', '" :', '" ,', '": Ġ', '", Ġ', "} ,", "a b", "o n", "t r", "tr u", "tru e", "n u", "l l", "nu ll")


def tiny_phi(
    folder: Path, shape: dict[str, object], context: int = 1024, seed: int = 0, *, ascii_text: bool = False
) -> Path:
    """A checkpoint of a Phi3ForCausalLM whose tokenizer knows TOKENS single characters, or ASCII_VOCABULARY."""
    folder.mkdir(parents=True)
    config: dict[str, object] = {
        "model_type": "phi3",
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "vocab_size": ASCII_VOCABULARY if ascii_text else VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    } | shape
    if "rope_scaling" in config:
        config["max_position_embeddings"] = 4 * context
        config["original_max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config))
    if ascii_text:
        _write_byte_level(folder)
    else:
        write_tokenizer(folder)
    _write_weights(folder, config, np.random.default_rng(seed))
    return folder


def copying_phi(
    folder: Path, shape: dict[str, object], length: int, context: int = 1024, layers_weigh: float = 0.0
) -> Path:
    """A planted model whose answers repeat, as those of a model do that copies: every token of a cycle of `length`
    is followed by the next one.

    Args:
        layers_weigh: how much the layers add to a token's embedding, so that logits tell of all tokens before; 0: the
            layers compute as any model's do and add nothing.
    """
    assert FIRST + length <= TOKENS
    source = tiny_phi(folder, shape, context)
    weights = dict(load_file(source / "model.safetensors"))
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= np.float32(layers_weigh)
    weights["model.norm.weight"] = np.ones_like(weights["model.norm.weight"])
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    head[:] = 0
    for place in range(length):
        head[FIRST + (place + 1) % length] = embedding[FIRST + place]
    save_file(weights, source / "model.safetensors")
    return source


def cycle(length: int, count: int) -> str:
    """The first tokens that `copying_phi` says, as text."""
    return "".join(chr(0x4E00 + FIRST + place % length) for place in range(count))


def write_tokenizer(folder: Path) -> None:
    """One that knows TOKENS single characters."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(0x4E00 + index): index for index in range(FIRST, TOKENS)}
    special = [
        {"id": index, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for index, text in enumerate(("<unk>", "<s>", "</s>"))
    ]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": special, "model": model, "decoder": None, "normalizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": None, "post_processor": None}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )


def _write_byte_level(folder: Path) -> None:
    letters = [*map(chr, (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)))]
    letters += [chr(0x100 + place) for place in range(256 - len(letters))]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for text in (*letters, *(merge.replace(" ", "") for merge in MERGES)):
        vocabulary[text] = len(vocabulary)
    special = [
        {"id": index, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for index, text in enumerate(("<unk>", "<s>", "</s>"))
    ]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "merges": list(MERGES)}
    tokenizer = {"version": "1.0", "added_tokens": special, "model": model, "decoder": step, "normalizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": step, "post_processor": None}))
    words = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def _write_weights(folder: Path, config: dict[str, object], rng: np.random.Generator) -> None:
    hidden, inner, heads, kv_heads, layers = (
        int(str(config[key]))
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "num_hidden_layers",
        )
    )
    head_dim = hidden // heads

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return rng.standard_normal((rows, columns)).astype(np.float32) / np.float32(np.sqrt(columns))

    tensors = {
        "model.embed_tokens.weight": matrix(int(str(config["vocab_size"])), hidden),
        "model.norm.weight": rng.uniform(0.7, 1.3, hidden).astype(np.float32),
    }
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = matrix(int(str(config["vocab_size"])), hidden)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": rng.uniform(0.7, 1.3, hidden).astype(np.float32),
            f"{name}.self_attn.qkv_proj.weight": matrix((heads + 2 * kv_heads) * head_dim, hidden),
            f"{name}.self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
            f"{name}.post_attention_layernorm.weight": rng.uniform(0.7, 1.3, hidden).astype(np.float32),
            f"{name}.mlp.gate_up_proj.weight": matrix(2 * inner, hidden),
            f"{name}.mlp.down_proj.weight": matrix(hidden, inner),
        }
    save_file(tensors, folder / "model.safetensors")
