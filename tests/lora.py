"""Bundles of the tiny fixtures that take adapters, adapters for them, and a model's logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import edgephi
from edgephi.runtime.engines.base import KvSequence
from tests.tiny_phi import write_tokenizer


def export_fixture(source: Path, folder: Path, **options: Any) -> Path:
    """A fixture, with a tokenizer that it lacks, as a bundle that takes adapters of rank 8; in float32 unless told."""
    named = folder / source.name
    shutil.copytree(source, named)
    write_tokenizer(named)
    edgephi.export_model(named, folder / "bundle", **{"precision": "fp32", "lora": 8, "devices": ["cpu"], **options})
    return folder / "bundle"


def logits_of(sequence: KvSequence, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] behind each of some tokens, one run for each."""
    rows: list[NDArray[np.float32]] = []

    def next_token(logits: NDArray[np.float32]) -> int:
        rows.append(logits.copy())
        return ids[min(len(rows), len(ids) - 1)]

    assert sequence.prefill(ids[:1], lambda: False)
    for _ in ids:
        sequence.step(next_token)
    return np.array(rows)


def write_peft(folder: Path, config: Mapping[str, object], tensors: Mapping[str, NDArray[Any]]) -> Path:
    """An adapter in PEFT's layout; `tensors` by the modules' whole names with `.lora_A` or `.lora_B`."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", **config}))
    named = {f"base_model.model.{name}.weight": np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What `write_peft` takes, of an adapter that PEFT saved."""
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {name.removeprefix("base_model.model.").removesuffix(".weight"): tensors[name] for name in tensors}
    return json.loads((folder / "adapter_config.json").read_text()), named


def random_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 8,
    seed: int = 0,
    layers: int = 2,
    strength: float = 0.5,
    **config: Any,
) -> Path:
    """Random values for modules of every layer, by their names behind it: (inputs, outputs)."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for module, (inputs, outputs) in shapes.items():
            name = f"model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A"] = (rng.standard_normal((rank, inputs)) / np.sqrt(inputs)).astype(np.float32)
            tensors[f"{name}.lora_B"] = (strength * rng.standard_normal((outputs, rank))).astype(np.float32)
    targets = [module.rpartition(".")[2] for module in shapes]
    return write_peft(folder, {"r": rank, "lora_alpha": rank, "target_modules": targets, **config}, tensors)


TINY = {
    "self_attn.qkv_proj": (128, 384),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_up_proj": (128, 384),
    "mlp.down_proj": (192, 128),
}
"""Modules of `tests.tiny_phi.PHI_3`."""
SMOLLM2 = {
    "self_attn.q_proj": (576, 576),
    "self_attn.v_proj": (576, 192),
    "mlp.down_proj": (1536, 576),
}
"""Some of SmolLM2-135M's, which has 30 layers."""
