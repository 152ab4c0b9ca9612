"""Small valid inputs of every kind; each takes milliseconds to export or to load."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tests.fuzz.tree import Tree, read_tree
from tests.tiny_phi import PHI_3, PHI_4_MINI, TOKENS, tiny_phi

CONTEXT = 64
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>' + "
    "message['content'] + '<|end|>' }}{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] + "
    "'<|end|>' }}{% else %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
GGUF_FILE = "model.gguf"
_SMALL: dict[str, object] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


def plain_phi3(folder: Path) -> Path:
    """A Phi-3 of one layer without a chat template, in one file."""
    return tiny_phi(folder, PHI_3 | _SMALL | {"num_attention_heads": 2, "num_key_value_heads": 2}, CONTEXT)


def chatting_phi4(folder: Path) -> Path:
    """A Phi-4-mini of one layer: LongRoPE, a tied head, four markers and a chat template."""
    factors = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8}
    tiny_phi(folder, PHI_4_MINI | _SMALL | {"num_attention_heads": 2, "rope_scaling": factors}, CONTEXT)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for index, marker in enumerate(MARKERS):
        flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        tokenizer["added_tokens"].append({"id": TOKENS + index, "content": marker} | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_level_phi3(folder: Path) -> Path:
    """A Phi-3 with a byte-level tokenizer, its template in a file of its own, and a generation_config.json."""
    plain_phi3(folder)
    specials = ["<s>", "</s>", *MARKERS]
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789,.ABCDEFGHIJKL"][: 64 - len(specials) - 3]
    vocabulary = {text: index for index, text in enumerate([*specials, *alphabet, "Ġ", "Ċ", "ab"])}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,3}|\s+"}, "behavior": "Isolated", "invert": False}
    levels = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text} | flags for index, text in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"} | levels]},
        "post_processor": {"type": "ByteLevel"} | levels,
        "decoder": {"type": "ByteLevel"} | levels,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "dropout": None, "unk_token": None}
        | {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False},
        "pad_token": "</s>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(index): {"content": text} | flags for index, text in enumerate(specials)},
    }
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 5], "do_sample": True, "temperature": 0.7},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def fixture(name: str) -> Callable[[Path], Path]:
    """A checkpoint of tests/fixtures with the tokenizer of characters."""

    def build(folder: Path) -> Path:
        source = Path(__file__).resolve().parents[1] / "fixtures" / name
        folder.mkdir()
        for file in source.iterdir():
            if file.name != "reference.npz":
                (folder / file.name).write_bytes(file.read_bytes())
        rows = json.loads((folder / "config.json").read_text())["vocab_size"]
        model = {"type": "BPE", "vocab": {chr(0x4E00 + index): index for index in range(rows)}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        settings = {"eos_token": chr(0x4E02), "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return build


CHECKPOINTS: tuple[Callable[[Path], Path], ...] = (
    plain_phi3,
    chatting_phi4,
    byte_level_phi3,
    fixture("llama-gqa"),
    fixture("llama3-rope"),
    fixture("phi-parallel"),
    fixture("phimoe"),
)
"""Phi-3, Phi-4-mini, two shards of a Llama, llama3's rope, phi-2, experts."""


@cache
def checkpoint(index: int) -> Tree:
    """Files of the checkpoint of that number, the same every time."""
    with TemporaryDirectory() as folder:
        return read_tree(CHECKPOINTS[index % len(CHECKPOINTS)](Path(folder) / "made"))


@cache
def gguf_file(index: int) -> Tree:
    """A GGUF file: Llama or Phi-3, in one of five number formats, with one of two kinds of tokenizer."""
    arch, storage = (("llama", "F32"), ("phi3", "Q8_0"), ("llama", "Q4_0"), ("phi3", "Q4_K"), ("llama", "Q4_1"))[index]
    with TemporaryDirectory() as folder:
        _write_gguf(Path(folder) / GGUF_FILE, arch, storage)
        return read_tree(Path(folder))


GGUF_FILES = 5


def _write_gguf(path: Path, arch: str, storage: str) -> None:
    import gguf

    hidden, inner, heads, kv_heads = (256, 256, 4, 2) if storage == "Q4_K" else (64, 96, 4, 2)
    specials = ["<unk>", "<s>", "</s>", *MARKERS]
    sentencepiece = arch == "llama"
    pieces = [f"<0x{byte:02X}>" for byte in range(0x30, 0x3A)] if sentencepiece else ["Ġ", "Ċ"]
    tokens = [*specials, *pieces, *[chr(code) for code in range(97, 123)], *(["▁", "▁a"] if sentencepiece else ["ab"])]
    types = [2, *[3] * (len(specials) - 1), *[6 if sentencepiece else 1] * len(pieces)]
    types += [1] * (len(tokens) - len(types))
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else "phi-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
    else:
        writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(7)
    matrices = {
        "token_embd.weight": (len(tokens), hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_down.weight": (hidden, inner),
    }
    if arch == "llama":
        matrices |= {f"blk.0.ffn_{name}.weight": (inner, hidden) for name in ("gate", "up")}
        matrices |= {f"blk.0.attn_{name}.weight": (hidden // 2, hidden) for name in "kv"}
        matrices["blk.0.attn_q.weight"] = (hidden, hidden)
    else:
        matrices |= {"blk.0.attn_qkv.weight": (2 * hidden, hidden), "blk.0.ffn_up.weight": (2 * inner, hidden)}
        matrices["output.weight"] = (len(tokens), hidden)
    kind = gguf.GGMLQuantizationType[storage]
    for name, shape in matrices.items():
        values = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        if storage == "F32":
            writer.add_tensor(name, values)
        elif (
            storage == "Q4_K"
        ):  # the gguf package does not write these: any bits are a block when its scales are finite
            _, size = gguf.GGML_QUANT_SIZES[kind]
            blocks = rng.integers(0, 256, (values.size // 256, size), np.uint8)
            blocks[:, :4] = np.array([1e-4, 1e-4], np.float16).view(np.uint8)
            writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, rng.uniform(0.7, 1.3, hidden).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BUNDLES = 3


@cache
def bundle(index: int) -> Tree:
    """A bundle: float32 without a template; int4 with one, LongRoPE and golden answers; int8 with experts."""
    import edgephi

    build, precision = ((plain_phi3, "fp32"), (chatting_phi4, "int4"), (fixture("phimoe"), "int8"))[index]
    with TemporaryDirectory() as folder:
        made = Path(folder) / "bundle"
        edgephi.export(
            build(Path(folder) / "source"), made, precision=precision, quantize="rtn" if index == 1 else "auto"
        )  # type: ignore[arg-type]
        if index == 1:
            manifest = json.loads((made / "edgephi.json").read_text())
            manifest["quality"] = _CONTRACT
            (made / "edgephi.json").write_text(json.dumps(manifest, indent=2))
        return read_tree(made)


_CONTRACT = {
    "text": {"name": "text.txt", "sha256": "0" * 64, "windows": 1, "window_length": 16},
    "perplexity": 60.0,
    "against": None,
    "against_perplexity": None,
    "kl_mean": None,
    "kl_p99": None,
    "top1_agreement": None,
    "providers": ["CPUExecutionProvider"],
    "versions": {"onnxruntime": "1.31.1"},
    "golden": [{"prompt": "一", "prompt_ids": [5], "token_ids": [6, 7], "margins": [0.1, 0.2]}],
}
