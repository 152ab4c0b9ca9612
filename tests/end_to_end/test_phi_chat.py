"""Real Phi tokenizers and templates through a bundle: the prompt is the template's, its stop tokens end an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jinja2
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

import edgephi
from edgephi.errors import PromptError

HIDDEN, INNER, VOCABULARY = 32, 32, 32064

CONVERSATION = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is 12 + 34?"},
    {"role": "assistant", "content": "46"},
    {"role": "user", "content": "  And in French, 日本語?"},
]


def phi3_checkpoint(folder: Path, tokenizer: Path, always: int) -> Path:
    """A Phi-3 of one layer that answers `always` with the same token, whatever it is asked.

    Attention and MLP add nothing to the hidden state, which is all ones; one row of the head is ones, the others zero.
    """
    folder.mkdir()
    config = {
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 4096,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    head = np.zeros((VOCABULARY, HIDDEN), np.float32)
    head[always] = 1
    ones, layer = np.ones(HIDDEN, np.float32), "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": np.ones((VOCABULARY, HIDDEN), np.float32),
        f"{layer}.input_layernorm.weight": ones,
        f"{layer}.self_attn.qkv_proj.weight": np.zeros((3 * HIDDEN, HIDDEN), np.float32),
        f"{layer}.self_attn.o_proj.weight": np.zeros((HIDDEN, HIDDEN), np.float32),
        f"{layer}.post_attention_layernorm.weight": ones.copy(),
        f"{layer}.mlp.gate_up_proj.weight": np.zeros((2 * INNER, HIDDEN), np.float32),
        f"{layer}.mlp.down_proj.weight": np.zeros((HIDDEN, INNER), np.float32),
        "model.norm.weight": ones.copy(),
        "lm_head.weight": head,
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def rendered_by_jinja(tokenizer: Path, messages: list[dict[str, str]]) -> str:
    config = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(config["chat_template"])
    tokens = {key: config[key] for key in ("bos_token", "eos_token")}
    return template.render(messages=messages, add_generation_prompt=True, **tokens)


@pytest.mark.parametrize("stop", ["<|end|>", "<|endoftext|>"])
@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3-medium"])
def test_a_stop_token_ends_the_answer(name: str, stop: str, shared_data: Path, tmp_path: Path) -> None:
    original = shared_data / "tokenizers" / name
    tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
    source = phi3_checkpoint(tmp_path / "checkpoint", original, tokenizer.token_to_id(stop))
    edgephi.export(source, tmp_path / "bundle")
    with edgephi.load(tmp_path / "bundle") as model:
        answer = model.chat("Hello", max_new_tokens=5).result()
        assert (answer.text, answer.finish, answer.new_tokens) == ("", "stop", 1)


def test_a_token_that_is_no_stop_token_does_not_end_the_answer(shared_data: Path, tmp_path: Path) -> None:
    original = shared_data / "tokenizers" / "phi-3-mini"
    tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
    source = phi3_checkpoint(tmp_path / "checkpoint", original, tokenizer.token_to_id("▁yes"))
    edgephi.export(source, tmp_path / "bundle")
    with edgephi.load(tmp_path / "bundle") as model:
        answer = model.chat("Hello", max_new_tokens=5).result()
    assert (answer.finish, answer.new_tokens) == ("length", 5)
    assert answer.text.split() == ["yes"] * 5


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3-medium"])
def test_messages_become_the_prompt_that_the_template_gives(name: str, shared_data: Path, tmp_path: Path) -> None:
    original = shared_data / "tokenizers" / name
    tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
    edgephi.export(phi3_checkpoint(tmp_path / "checkpoint", original, 5), tmp_path / "bundle")
    asked = CONVERSATION if name == "phi-3-mini" else [one for one in CONVERSATION if one["role"] != "system"]
    expected = tokenizer.encode(rendered_by_jinja(original, asked), add_special_tokens=False).ids
    with edgephi.load(tmp_path / "bundle") as model:
        assert model.encode_chat(asked) == expected
        assert model.chat(asked, max_new_tokens=1).result().prompt_tokens == len(expected)


def test_a_system_message_that_phi_3_medium_would_leave_out_is_an_error(shared_data: Path, tmp_path: Path) -> None:
    original = shared_data / "tokenizers" / "phi-3-medium"
    edgephi.export(phi3_checkpoint(tmp_path / "checkpoint", original, 5), tmp_path / "bundle")
    with edgephi.load(tmp_path / "bundle") as model, pytest.raises(PromptError, match="system"):
        model.chat(CONVERSATION, max_new_tokens=1)
