"""genai_config.json of a decoder in stages: onnxruntime-genai's `decoder-pipeline`.

Source of the keys and of what they do: microsoft/onnxruntime-genai, src/config.h, src/models/decoder_only_pipeline.cpp
and src/models/input_ids.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from edgephi.bundle import GENAI_CONFIG
from edgephi.devices.hexagon import SHARE_CONTEXTS, HexagonTarget, load_options
from edgephi.export.npu.static_graph import INPUT_IDS, LAST, LOGITS, TOTAL, Stage, hidden_name
from edgephi.export.spec import DecoderSpec
from edgephi.export.tokenizer.files import TokenizerFiles

EMBEDDING_FILE, HEAD_FILE = "embedding.onnx", "head.onnx"

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"


def stage_file(stage: Stage) -> str:
    """File of a compiled stage."""
    return f"{stage.name}.onnx"


def padding_id(spec: DecoderSpec) -> int:
    """The id that fills up the last chunk of a prompt.

    onnxruntime-genai ends a prompt at the first such id, so it has to be one that no text contains. Published Phi
    models have more rows in the embedding than the tokenizer has ids. Where the last row is a token's, a caller gives
    a prompt from that token on token by token.
    """
    return spec.vocabulary_size - 1


def pipeline_config(
    spec: DecoderSpec, tokenizer: TokenizerFiles, stages: Sequence[Stage], target: HexagonTarget, *, shared: bool
) -> dict[str, Json]:
    """The configuration: embedding, the prompt's stages, the token's stages, head.

    `context_length` is the length of the cache. onnxruntime-genai counts the padding of the last chunk as tokens, so a
    sequence of `cache rows - chunk` tokens always fits.
    """
    eos = list(tokenizer.eos_token_ids)
    rows = stages[0].cache_rows
    on_cpu: Json = {"log_id": "onnxruntime-genai", "provider_options": []}
    options: dict[str, Json] = dict(load_options(target.htp_arch, target.soc_model))
    on_npu: dict[str, Json] = {"log_id": "onnxruntime-genai", "provider_options": [{"QNN": options}]}
    if shared:  # sessions of one binary load it once
        on_npu[SHARE_CONTEXTS] = "1"
    embedding: Json = {
        "embedding": {
            "filename": EMBEDDING_FILE,
            "inputs": [INPUT_IDS],
            "outputs": [hidden_name(0)],
            "session_options": on_cpu,
        }
    }
    head: Json = {
        "head": {
            "filename": HEAD_FILE,
            "inputs": [hidden_name(spec.layers)],
            "outputs": [LOGITS],
            "session_options": on_cpu,
            "is_lm_head": True,
        }
    }
    pipeline: list[Json] = [embedding]
    for stage in stages:
        entry: dict[str, Json] = {
            "filename": stage_file(stage),
            "inputs": list(stage.inputs),
            "outputs": list(stage.outputs),
            "session_options": on_npu if stage.tokens > 1 or target.tokens_on == "npu" else on_cpu,
            "run_on_prompt": stage.tokens > 1,
            "run_on_token_gen": stage.tokens == 1,
        }
        pipeline.append({stage.name: entry})
    pipeline.append(head)
    decoder: dict[str, Json] = {
        "session_options": on_cpu,
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "sliding_window": {
            "window_size": target.chunk,
            "pad_value": 0,
            "alignment": "left",
            "slide_key_value_cache": False,
        },
        "inputs": {
            "input_ids": INPUT_IDS,
            "past_sequence_length": LAST,
            "total_sequence_length": TOTAL,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": LOGITS,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "pipeline": pipeline,
    }
    model: dict[str, Json] = {
        "type": "decoder-pipeline",
        "context_length": rows,
        "vocab_size": spec.vocabulary_size,
        "eos_token_id": list[Json](eos) if len(eos) != 1 else eos[0],
        "pad_token_id": padding_id(spec),
        "decoder": decoder,
    }
    if tokenizer.bos_token_id is not None:
        model["bos_token_id"] = tokenizer.bos_token_id
    search: dict[str, Json] = {
        "do_sample": False,
        "max_length": rows,
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


def write_pipeline_config(
    spec: DecoderSpec,
    tokenizer: TokenizerFiles,
    stages: Sequence[Stage],
    target: HexagonTarget,
    folder: Path,
    *,
    shared: bool = False,
) -> None:
    """Write genai_config.json (UTF-8, \\n)."""
    text = (
        json.dumps(pipeline_config(spec, tokenizer, stages, target, shared=shared), indent=2, ensure_ascii=False) + "\n"
    )
    (folder / GENAI_CONFIG).write_text(text, encoding="utf-8", newline="\n")
