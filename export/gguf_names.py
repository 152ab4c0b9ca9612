"""GGUF metadata and tensor names in the words of Hugging Face checkpoints, so that one family file reads both.

Source of the names: ggml-org/llama.cpp, gguf-py/gguf/constants.py and tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgephi.errors import UnsupportedModelError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI3_BLOCK = _BLOCK | {"ffn_up": "mlp.gate_up_proj"}
ARCHITECTURES = ("llama", "phi3")


def _unsupported(what: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(what, where=where, remedy="Use a GGUF file of a supported architecture")


def config_from_metadata(
    metadata: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, object]:
    """What config.json would say (transformers 4 keys), from `general.architecture` and that architecture's keys."""
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise _unsupported(f"general.architecture is {arch!r}: edgephi reads {', '.join(ARCHITECTURES)}", where)
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise _unsupported("there is no tensor token_embd.weight", where)

    def value(key: str) -> object:
        return metadata.get(f"{arch}.{key}")

    heads = value("attention.head_count")
    hidden = value("embedding_length")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise _unsupported(f"{arch}.attention.head_count is {heads!r}, {arch}.embedding_length is {hidden!r}", where)
    head_dim = value("attention.key_length") or hidden // heads
    rope_dim = value("rope.dimension_count") or head_dim
    if not isinstance(head_dim, int) or not isinstance(rope_dim, int) or head_dim < 1:
        raise _unsupported(f"{arch}.rope.dimension_count is {rope_dim!r}", where)
    if value("attention.value_length") not in (None, head_dim):
        raise _unsupported(f"{arch}.attention.value_length is {value('attention.value_length')!r}", where)
    scaling = value("rope.scaling.type")
    if scaling not in (None, "none") or any(
        name.startswith("rope_fac") or name == "rope_freqs.weight" for name in shapes
    ):
        raise _unsupported(f"{arch}.rope.scaling.type is {scaling!r}, or the file carries rope factors", where)
    config: dict[str, object] = {
        "model_type": arch,
        "hidden_size": hidden,
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "intermediate_size": value("feed_forward_length"),
        "vocab_size": embedding[0],
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base") or 10000.0,
        "partial_rotary_factor": rope_dim / head_dim,
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_down.bias" in shapes,
    }
    window = value("attention.sliding_window")
    if window:
        config["sliding_window"] = window
    return config


def hugging_face_name(name: str, arch: str, where: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        if stem in _TOP:
            return f"{_TOP[stem]}.{kind}"
        match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", stem)
        block = _PHI3_BLOCK if arch == "phi3" else _BLOCK
        if match and match[2] in block:
            return f"model.layers.{match[1]}.{block[match[2]]}.{kind}"
    raise _unsupported(f"edgephi does not know the tensor {name}", where)


def interleaved_head_dim(name: str, config: Mapping[str, object]) -> int | None:
    """llama.cpp stores q and k of the llama family with rotary pairs side by side; phi3 keeps them in halves."""
    if config["model_type"] == "llama" and re.search(r"\.[qk]_proj\.", name):
        head_dim = config["head_dim"]
        assert isinstance(head_dim, int)
        return head_dim
    return None
