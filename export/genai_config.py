"""genai_config.json: how onnxruntime-genai finds its way through the graph.

Source of the keys: microsoft/onnxruntime-genai, src/config.h.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgephi.bundle import GENAI_CONFIG
from edgephi.export.spec import DecoderSpec
from edgephi.export.tokenizer_files import TokenizerFiles

GRAPH_FILE = "model.onnx"


def genai_config(spec: DecoderSpec, tokenizer: TokenizerFiles) -> dict[str, object]:
    """The configuration of a bundle whose graph is `model.onnx`; greedy search unless the caller asks otherwise."""
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
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}


def write_genai_config(spec: DecoderSpec, tokenizer: TokenizerFiles, folder: Path) -> None:
    """Write genai_config.json (UTF-8, \\n)."""
    text = json.dumps(genai_config(spec, tokenizer), indent=2, ensure_ascii=False) + "\n"
    (folder / GENAI_CONFIG).write_text(text, encoding="utf-8", newline="\n")
