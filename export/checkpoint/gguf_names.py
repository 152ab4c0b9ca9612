"""GGUF metadata and tensor names in the words of Hugging Face checkpoints, so that one family file reads both.

Source of the names: ggml-org/llama.cpp, gguf-py/gguf/constants.py and tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgephi.errors import UnsupportedModelError, WeightError
from edgephi.export.checkpoint.config import Config, shown
from edgephi.export.checkpoint.gguf_keys import check_keys
from edgephi.export.checkpoint.gguf_rope import PHI3_FIRST_CONTEXT, rope_words
from edgephi.export.spec import TensorRef

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
_BLOCKS = {
    "llama": _BLOCK,
    "phi": _BLOCK | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    "phi3": _BLOCK | {"ffn_up": "mlp.gate_up_proj"},
}
_MODEL_TYPES = {"llama": "llama", "phi2": "phi", "phi3": "phi3"}
ARCHITECTURES = tuple(_MODEL_TYPES)
PHI3_FIRST_WINDOW = 2047


def _unsupported(what: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(what, where=where, remedy="Use a GGUF file of a supported architecture")


def config_from_metadata(
    metadata: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, Sequence[float]],
    where: str,
) -> dict[str, object]:
    """What config.json would say (transformers 4 keys), from `general.architecture` and that architecture's keys.

    Args:
        metadata: GGUF keys → Python values.
        shapes: GGUF tensor names → shapes, row-major.
        factors: values of the rotary factor tensors, see `rope_words`.
        where: the file's name, for errors.

    Raises:
        UnsupportedModelError: a key edgephi does not know, or a value it does not build; key and value are named.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise _unsupported(f"general.architecture is {shown(arch)}: edgephi reads {', '.join(ARCHITECTURES)}", where)
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise _unsupported("there is no tensor token_embd.weight", where)

    keys = Config(metadata, where)

    def value(key: str) -> object:
        return metadata.get(f"{arch}.{key}")

    def size(key: str, default: int | None = None) -> int:
        # 0 is how some converters leave a key out
        return keys.integer(f"{arch}.{key}") if default is None or value(key) not in (None, 0) else default

    heads, hidden = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", max(1, hidden // heads))
    rope_dim = size("rope.dimension_count", head_dim)
    if value("attention.value_length") not in (None, head_dim):
        raise _unsupported(f"{arch}.attention.value_length is {shown(value('attention.value_length'))}", where)
    if arch == "llama" and rope_dim != head_dim:
        # rows lie in pairs within the whole head, so the rotated part is not the one Hugging Face's layout rotates
        raise _unsupported(f"{arch}.rope.dimension_count is {rope_dim}, a part of the head's {head_dim}", where)
    epsilon = "attention.layer_norm_epsilon" if arch == "phi2" else "attention.layer_norm_rms_epsilon"
    keys.positive(f"{arch}.{epsilon}")
    check_keys(metadata, arch, where)
    config: dict[str, object] = {
        "model_type": _MODEL_TYPES[arch],
        "hidden_size": hidden,
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": size("feed_forward_length"),
        "vocab_size": embedding[0],
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "layer_norm_eps": value("attention.layer_norm_epsilon"),
        "partial_rotary_factor": rope_dim / head_dim,
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_down.bias" in shapes,
    }
    window = value("attention.sliding_window")
    if arch == "phi3" and window is None and value("context_length") == PHI3_FIRST_CONTEXT:
        # files older than the key (July 2024) are of Phi-3-mini-4k and medium-4k: ggml-org/llama.cpp, pull request 8627
        window = PHI3_FIRST_WINDOW
    if window and arch != "phi3":
        raise _unsupported(f"{arch}.attention.sliding_window is {shown(window)}", where)
    if window:
        config["sliding_window"] = window
    return config | rope_words(metadata, arch, rope_dim, factors, where)


def hugging_face_name(name: str, model_type: str, where: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        if model_type == "phi" and stem == "output_norm":
            return f"model.final_layernorm.{kind}"
        if stem in _TOP:
            return f"{_TOP[stem]}.{kind}"
        match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", stem)
        block = _BLOCKS[model_type]
        if match and match[2] in block:
            return f"model.layers.{match[1]}.{block[match[2]]}.{kind}"
    raise _unsupported(f"edgephi does not know the tensor {name}", where)


def split_qkv(ref: TensorRef, config: Mapping[str, object]) -> list[TensorRef]:
    """The three parts of phi-2's fused `attn_qkv`, rows of q, then k, then v; any other tensor as it is.

    Files converted from phi-2's first checkpoint are fused, later ones are not; Hugging Face keeps the three apart.
    Source of the order: ggml-org/llama.cpp, src/models/phi2.cpp.

    Raises:
        WeightError: the rows are not those of q, k and v.
    """
    match = re.fullmatch(r"(blk\.\d{1,4}\.attn_)qkv(\.\w+)", ref.name)
    if config["model_type"] != "phi" or not match:
        return [ref]
    sizes_of = Config(config, str(ref.file))
    head_dim = sizes_of.integer("head_dim")
    query, kv = (sizes_of.integer(f"num_{x}_heads") * head_dim for x in ("attention", "key_value"))
    sizes = (query, kv, kv)
    if sum(sizes) != ref.shape[0]:
        raise WeightError(
            f"tensor {ref.name} has {ref.shape[0]} rows where the metadata demands {sum(sizes)}",
            where=ref.file,
            remedy="Download the file again, or convert the model again with a recent llama.cpp",
        )
    row_bytes, start, parts = ref.bytes // ref.shape[0], 0, []
    for letter, rows in zip("qkv", sizes, strict=True):
        name = f"{match[1]}{letter}{match[2]}"
        offset, shape = ref.offset + start * row_bytes, (rows, *ref.shape[1:])
        parts.append(replace(ref, name=name, offset=offset, bytes=rows * row_bytes, shape=shape))
        start += rows
    return parts


def interleaved_head_dim(name: str, config: Mapping[str, object]) -> int | None:
    """llama.cpp stores q and k of the llama family with rotary pairs side by side; phi3 keeps them in halves."""
    if config["model_type"] == "llama" and re.search(r"\.[qk]_proj\.", name):
        head_dim = config["head_dim"]
        assert isinstance(head_dim, int)
        return head_dim
    return None
