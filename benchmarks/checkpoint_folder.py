"""A GGUF file written as the Hugging Face folder it came from, for tools that read nothing else.

Tensors are float16 under Hugging Face names and in Hugging Face row order, streamed slice by slice. Format of the file:
huggingface/safetensors README, "Format". The tokenizer files are those edgephi puts into a bundle.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np

from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.checkpoint.tensors import read_rows
from edgephi.export.spec import Checkpoint
from edgephi.export.tokenizer.files import TokenizerFiles
from edgephi.export.tokenizer.files import write as write_tokenizer
from edgephi.export.tokenizer.gguf import tokenizer_from_gguf

ARCHITECTURES = {"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM"}
VALUES_PER_SLICE = 1 << 22


def write_checkpoint_folder(gguf: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (float16) and the tokenizer files.

    Raises:
        EdgephiError: the GGUF file cannot be read, or a value does not fit float16.
    """
    checkpoint = open_gguf(gguf)
    assert checkpoint.gguf_metadata is not None
    tokenizer = tokenizer_from_gguf(checkpoint.gguf_metadata, str(gguf))
    folder.mkdir(parents=True, exist_ok=True)
    _write_configs(checkpoint, tokenizer, folder)
    write_tokenizer(tokenizer, folder)
    _write_safetensors(checkpoint, folder / "model.safetensors")


def _write_configs(checkpoint: Checkpoint, tokenizer: TokenizerFiles, folder: Path) -> None:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(tokenizer.eos_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = {
        "architectures": [ARCHITECTURES[str(checkpoint.config["model_type"])]],
        **checkpoint.config,
        **special,
        "hidden_act": "silu",
        "torch_dtype": "float16",
    }
    for name, values in (("config.json", config), ("generation_config.json", special)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_safetensors(checkpoint: Checkpoint, path: Path) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, ref in checkpoint.tensors.items():
        start, end = end, end + 2 * prod(ref.shape)
        header[name] = {"dtype": "F16", "shape": ref.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for ref in checkpoint.tensors.values():
            step = max(1, VALUES_PER_SLICE // prod(ref.shape[1:]))
            for first in range(0, ref.shape[0], step):
                with np.errstate(over="ignore"):
                    values = read_rows(ref, first, min(first + step, ref.shape[0])).astype("<f2")
                if not np.isfinite(values).all():
                    raise UnsupportedModelError(
                        f"tensor {ref.name} does not fit float16",
                        where=ref.file,
                        remedy="Pass the published folder with --folder",
                    )
                stream.write(values.tobytes())
