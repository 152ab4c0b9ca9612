"""genai_config.json: how onnxruntime-genai finds its way through the graph.

Source of the keys: microsoft/onnxruntime-genai, src/config.h.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from edgephi.bundle import GENAI_CONFIG
from edgephi.export.tokenizer.files import TokenizerFiles

GRAPH_FILE = "model.onnx"


class Decoder(Protocol):
    """What the configuration says about a decoder."""

    @property
    def genai_type(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...


def genai_config(
    spec: Decoder,
    tokenizer: TokenizerFiles,
    *,
    position_ids: bool = False,
    shared_cache: bool = True,
    prefill_chunk: int | None = None,
) -> dict[str, object]:
    """The configuration of a bundle whose graph is `model.onnx`; greedy search unless the caller asks otherwise.

    Args:
        position_ids: the graph has that input.
        shared_cache: the graph writes new keys and values into the buffer it reads the past from (GroupQueryAttention);
            otherwise it returns past and new ones concatenated.
        prefill_chunk: how many tokens of a prompt to compute at once; None: all.
    """
    eos = list(tokenizer.eos_token_ids)
    model: dict[str, object] = {
        "type": spec.genai_type,
        "context_length": spec.context_length,
        "vocab_size": spec.vocabulary_size,
        "eos_token_id": eos if len(eos) != 1 else eos[0],
        "pad_token_id": tokenizer.pad_token_id,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": GRAPH_FILE,
            "head_size": spec.head_dim,
            "hidden_size": spec.hidden_size,
            "num_attention_heads": spec.heads,
            "num_hidden_layers": spec.layers,
            "num_key_value_heads": spec.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                **({"position_ids": "position_ids"} if position_ids else {}),
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    if tokenizer.bos_token_id is not None:
        model["bos_token_id"] = tokenizer.bos_token_id
    search: dict[str, object] = {
        "do_sample": False,
        "max_length": spec.context_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": shared_cache,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    if prefill_chunk is not None:
        search["chunk_size"] = prefill_chunk
    return {"model": model, "search": search}


def write_genai_config(
    spec: Decoder,
    tokenizer: TokenizerFiles,
    folder: Path,
    *,
    position_ids: bool = False,
    shared_cache: bool = True,
    prefill_chunk: int | None = None,
) -> None:
    """Write genai_config.json (UTF-8, \\n); the arguments are those of `genai_config`."""
    config = genai_config(
        spec, tokenizer, position_ids=position_ids, shared_cache=shared_cache, prefill_chunk=prefill_chunk
    )
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / GENAI_CONFIG).write_text(text, encoding="utf-8", newline="\n")
