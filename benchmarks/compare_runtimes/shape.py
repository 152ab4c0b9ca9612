"""A GGUF file of a published Phi model's shape with random weights, cut to some layers, that every peer can read.

The speed of a runtime does not depend on the values. Norms are ones; other weights are normal (0.02), float16. The
rope is plain: the builder and some readers do not take LongRoPE, and short prompts rotate alike. The vocabulary has the
published size and made-up words. Keys: ggml-org/ggml, docs/gguf.md; gguf-py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgephi.errors import UsageError
from edgephi.export.families.published import PUBLISHED

CONTEXT = 4096
NORMAL_TOKEN, CONTROL_TOKEN = 1, 3
END = "<|endoftext|>"


def require_shape(name: str) -> None:
    """Raises UsageError for a name that the table of published models does not have, or not as a phi3 model."""
    if PUBLISHED.get(name, {}).get("model_type") != "phi3":
        known = ", ".join(key for key, value in PUBLISHED.items() if value["model_type"] == "phi3")
        raise UsageError(f"{name!r} is no published model of the phi3 kind", remedy=f"Choose from {known}")


def write_shape(name: str, layers: int, path: Path, seed: int = 0) -> None:
    """Write `path`, at about twice as many bytes as there are parameters, through a file beside it.

    Raises:
        UsageError: the table of published models has no such phi3 model.
    """
    import gguf

    require_shape(name)
    config = PUBLISHED[name]
    sizes = {key: int(value) for key, value in config.items() if isinstance(value, int)}
    hidden, heads, kv_heads = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
    head, inner, vocabulary = hidden // heads, sizes["intermediate_size"], sizes["vocab_size"]
    share = config.get("partial_rotary_factor", 1.0)
    assert isinstance(share, float)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    writer = gguf.GGUFWriter(new, "phi3")
    writer.add_name(f"{name.rpartition('/')[2]}, {layers} layers, random")
    writer.add_context_length(CONTEXT)
    writer.add_rope_scaling_orig_ctx_len(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(int(head * share))
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(0)
    writer.add_file_type(1)
    _add_tokenizer(writer, vocabulary)
    rng = np.random.default_rng(seed)

    def random(rows: int, columns: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
        return (rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)).astype(np.float16)

    writer.add_tensor("token_embd.weight", random(vocabulary, hidden))
    for layer in range(layers):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", np.ones(hidden, np.float32))
        writer.add_tensor(f"{block}.attn_qkv.weight", random((heads + 2 * kv_heads) * head, hidden))
        writer.add_tensor(f"{block}.attn_output.weight", random(hidden, heads * head))
        writer.add_tensor(f"{block}.ffn_norm.weight", np.ones(hidden, np.float32))
        writer.add_tensor(f"{block}.ffn_up.weight", random(2 * inner, hidden))
        writer.add_tensor(f"{block}.ffn_down.weight", random(hidden, inner))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    if not config.get("tie_word_embeddings"):
        writer.add_tensor("output.weight", random(vocabulary, hidden))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    new.replace(path)


def _add_tokenizer(writer: object, vocabulary: int) -> None:
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    letters = list(_byte_letters())
    words = [*letters, END, "ab"]
    words += [f"word{index}" for index in range(vocabulary - len(words))]
    kinds = [NORMAL_TOKEN] * vocabulary
    kinds[len(letters)] = CONTROL_TOKEN
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(letters))
    writer.add_eos_token_id(len(letters))


def _byte_letters() -> list[str]:
    """GPT-2's 256 letters for bytes (Radford et al. 2019): printable bytes are themselves, others lie beyond 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    beyond = iter(range(256, 512))
    return [chr(byte if byte in printable else next(beyond)) for byte in range(256)]
