"""Phi-4-multimodal's text decoder is Phi-3's class; what surrounds it in the checkpoint is left out by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe
from tests.decoding import Decoder, build_graph, distance

LINEAR = r"(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)\.weight"
ENCODERS = (
    "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.self_attn.q_proj.weight",
    "model.embed_tokens_extend.image_embed.glb_GN",
    "model.embed_tokens_extend.audio_embed.encoder.encoders.0._checkpoint_wrapped_module.self_attn.linear_q.weight",
)


@pytest.fixture
def multimodal(fixtures: Path, tmp_path: Path) -> Path:
    """The fixture of Phi-4-mini's shape, dressed as the multimodal checkpoint is."""
    folder = tmp_path / "phi4mm"
    folder.mkdir()
    config = json.loads((fixtures / "phi3-gqa-partial" / "config.json").read_text())
    config |= {"model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for name, tensor in load_file(fixtures / "phi3-gqa-partial" / "model.safetensors").items():
        if not re.search(LINEAR, name):
            tensors[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.base_layer.weight"] = tensor
        for adapter in ("vision", "speech"):
            tensors[f"{stem}.lora_A.{adapter}.weight"] = np.ones((4, tensor.shape[1]), np.float32)
            tensors[f"{stem}.lora_B.{adapter}.weight"] = np.ones((tensor.shape[0], 4), np.float32)
    tensors |= {name: np.ones((2, 3), np.float32) for name in ENCODERS}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_text_decoder_equals_the_reference_without_adapters(
    multimodal: Path, fixtures: Path, tmp_path: Path
) -> None:
    reference = np.load(fixtures / "phi3-gqa-partial" / "reference.npz")
    graph = build_graph(multimodal, tmp_path / "graph", "fp32")
    assert distance(Decoder(graph).feed(reference["input_ids"]), reference["logits"]) < 1e-4
    assert distance(Decoder(graph).feed_one_by_one(reference["input_ids"]), reference["logits"]) < 1e-4


def test_onnxruntime_genai_sees_a_text_model(multimodal: Path) -> None:
    spec = describe(open_folder(multimodal)).spec
    assert (spec.family, spec.genai_type) == ("phi4mm", "phi3")


@pytest.mark.parametrize(
    "stranger",
    ["model.layers.0.self_attn.qkv_proj.lora_A.video.weight", "model.layers.0.self_attn.q_norm.weight"],
)
def test_a_tensor_nobody_named_is_refused(multimodal: Path, stranger: str) -> None:
    tensors = load_file(multimodal / "model.safetensors")
    save_file({**tensors, stranger: np.ones((2, 3), np.float32)}, multimodal / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="no use for"):
        describe(open_folder(multimodal))


def test_a_weight_under_both_names_is_refused(multimodal: Path) -> None:
    tensors = load_file(multimodal / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.base_layer.weight"]
    save_file(tensors, multimodal / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="base_layer"):
        describe(open_folder(multimodal))
