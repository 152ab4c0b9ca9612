"""A folder's config.json may say nothing about the computation that edgephi does not build, and much that changes
nothing: what the class of transformers reads decides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgephi.errors import EdgephiError, UnsupportedModelError
from edgephi.export.checkpoint.config import Config
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.families import describe, expected_tensors
from edgephi.export.families.config_keys import check_traced
from edgephi.export.families.published import PUBLISHED
from edgephi.export.spec import DecoderSpec

# what transformers 4.30 wrote into every config.json, and what tools leave there
LEFT_BEHIND: dict[str, object] = {
    "_name_or_path": "somebody/phi-tuned", "_attn_implementation_autoset": True, "_flash_attn_2_enabled": True,
    "add_cross_attention": False, "architectures": ["LlamaForCausalLM"], "attention_dropout": 0.1,
    "attn_implementation": "flash_attention_2", "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bad_words_ids": None, "begin_suppress_tokens": None, "bos_token_id": 1, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": True,
    "dtype": "bfloat16", "early_stopping": False, "embd_pdrop": 0.1, "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": [2, 7], "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "gradient_checkpointing": False, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02, "is_decoder": False, "is_encoder_decoder": False, "is_llama_config": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "lora_alpha": 16, "max_length": 20,
    "max_sequence_length": 2048, "max_window_layers": 28, "min_length": 0, "model_max_length": 4096,
    "neftune_noise_alpha": 5.0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False,
    "pad_token_id": -1, "prefix": None, "pretraining_tp": 2, "problem_type": None, "pruned_heads": {},
    "quantization_config": None, "remove_invalid_values": False, "repetition_penalty": 1.1, "resid_pdrop": 0.0,
    "return_dict": True, "return_dict_in_generate": False, "rope_interleaved": False, "rope_scaling": None,
    "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None, "temperature": 0.7,
    "tf_legacy_loss": False, "tie_encoder_decoder": False, "tokenizer_class": "LlamaTokenizer", "top_k": 50,
    "top_p": 1.0, "torch_dtype": "float16", "torchscript": False, "transformers_version": "4.44.0",
    "transformers.js_config": {"dtype": "q4"}, "typical_p": 1.0, "unsloth_fixed": True, "unsloth_version": "2024.9",
    "use_bfloat16": False, "use_cache": False, "use_sliding_window": False, "sliding_window": 131072,
    "cache_implementation": "static", "assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10,
    "compile_config": {"mode": "default"}, "disable_compile": True, "dola_layers": "low", "is_assistant": True,
    "low_memory": True, "max_matching_ngram_size": 2, "prefill_chunk_size": 512, "prompt_lookup_num_tokens": 10,
    "target_lookbehind": 10, "tp_plan": "auto", "base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"},
    "use_kernels": True, "group_size_ratio": 0.25, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"],
    "value_head_prefix": "score", "normalize_reward": False, "z_loss_enabled": False, "flash_rotary": False,
    "fused_dense": False, "n_embd": 48, "n_head": 3, "n_layer": 2, "rotary_dim": 16, "hidden_activation": "swish",
    "activation": "swiglu", "mlp_bias": False, "qk_layer_norms": False, "something_new": None, "and_empty": [],
}  # fmt: skip


def spec_of(source: Path, folder: Path, **changes: object) -> DecoderSpec:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return describe(open_folder(folder)).spec


def test_what_older_libraries_and_tools_leave_behind_changes_nothing(fixtures: Path, tmp_path: Path) -> None:
    plain = describe(open_folder(fixtures / "llama-tied")).spec
    assert spec_of(fixtures / "llama-tied", tmp_path / "c", **LEFT_BEHIND) == plain


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("llama-tied", "swish"),
        ("phi3-mha", "swish"),
        ("phimoe", "swish"),
        ("phi-parallel", "gelu_fast"),
        ("phi-parallel", "gelu_pytorch_tanh"),
        ("phi-parallel", "gelu_python_tanh"),
    ],
)
def test_an_activation_may_have_any_of_its_names(case: str, name: str, fixtures: Path, tmp_path: Path) -> None:
    """transformers' activations.py gives them one function; constants differ in the last digits at most."""
    assert spec_of(fixtures / case, tmp_path / "c", hidden_act=name) == describe(open_folder(fixtures / case)).spec
    with pytest.raises(UnsupportedModelError, match="hidden_act is 'gelu'"):
        spec_of(fixtures / case, tmp_path / "d", hidden_act="gelu")


@pytest.mark.parametrize("case", ["llama-tied", "phi-parallel"])
def test_a_length_that_is_left_out_is_transformers_default(case: str, fixtures: Path, tmp_path: Path) -> None:
    """The first Llama was published so."""
    spec = spec_of(fixtures / case, tmp_path / "c", max_position_embeddings=None, max_sequence_length=2048)
    assert spec.context_length == 2048


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_are_not_refused_for_a_key(model: str) -> None:
    common = {"initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True, "attention_dropout": 0.0}
    extra: dict[str, object] = {"full_attn_mod": 1, "interpolate_factor": 1} if "Phi-4-mini" in model else {}
    if "small" in model:  # its config.json on the hub
        extra = {"attention_dropout_prob": 0.0, "embedding_dropout_prob": 0.1, "ffn_dropout_prob": 0.1}
        extra |= {"pad_sequence_to_multiple_of_64": True, "reorder_and_upcast_attn": False}
    if "MoE" in model:
        extra = {"hidden_dropout": 0.0, "output_router_logits": False, "router_aux_loss_coef": 0.0}
    assert expected_tensors({**PUBLISHED[model], **common, **extra})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False),
        ("use_bidirectional_attention", True),
        ("attn_logit_softcapping", 30.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.0625),
        ("logits_scaling", 8.0),
        ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12.0),
        ("attention_multiplier", 0.5),
        ("query_pre_attn_scalar", 256),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 16),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("num_local_experts", 8),
        ("num_experts_per_tok", 2),
        ("qk_norm", True),
        ("pruned_heads", {"0": [1]}),
        ("per_layer_config", {"0": {"head_dim": 8}}),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("alibi", True),
        ("clip_qkv", 8.0),
        ("no_rope_layers", [1, 0]),
        ("rope_interleaved", True),
        ("rotary_pct", 0.25),
        ("use_rope", False),
        ("scale_attn_weights", False),
        ("use_parallel_residual", True),
        ("hidden_activation", "gelu"),
        ("n_embd", 128),
        ("n_layer", 3),
        ("rotary_dim", 8),
        ("hidden_act", "gelu"),
        ("norm_type", "layernorm"),
        ("position_embedding_type", "absolute"),
        ("draft_vocab_size", 320),
        ("attention_sinks", 4),
        ("a_key_of_tomorrow", False),
        ("a_key_of_tomorrow", "on"),
    ],
)
def test_what_is_not_built_is_refused_by_key_and_value(key: str, value: object, fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of(fixtures / "llama-tied", tmp_path / "c", **{key: value})
    assert f"{key} is {value!r}" in caught.value.what
    assert "config.json" in str(caught.value.where) and caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_multiplier", 0.25),
        ("query_pre_attn_scalar", 16),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "full_attention"]),
        ("partial_rotary_factor", 1.0),
        ("logit_scale", 1),
        ("is_causal", True),
        ("layer_norm_eps", 0.5),
    ],
)
def test_the_value_that_changes_nothing_is_let_through(key: str, value: object, fixtures: Path, tmp_path: Path) -> None:
    assert spec_of(fixtures / "llama-tied", tmp_path / "c", **{key: value}).head_dim == 16


@pytest.mark.parametrize(("key", "value"), [("use_sliding_window", False), ("max_window_layers", 2)])
def test_a_window_that_is_switched_off_elsewhere_is_refused(
    key: str, value: object, fixtures: Path, tmp_path: Path
) -> None:
    assert spec_of(fixtures / "phi3-window", tmp_path / "on", use_sliding_window=True).sliding_window == 8
    with pytest.raises(UnsupportedModelError, match=key):
        spec_of(fixtures / "phi3-window", tmp_path / "c", **{key: value})


NOT_A_NUMBER = [float("nan"), float("inf"), float("-inf"), 0, -1e-5, 1e300, 1e-60, "1e-5", True, [1e-5]]


@pytest.mark.parametrize("value", NOT_A_NUMBER)
@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("llama-tied", "rms_norm_eps"),
        ("llama-tied", "rope_theta"),
        ("phi-parallel", "layer_norm_eps"),
        ("phi-parallel", "partial_rotary_factor"),
        ("phi3-mha", "rms_norm_eps"),
        ("phimoe", "rms_norm_eps"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_key_and_value(
    case: str, key: str, value: object, fixtures: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of(fixtures / case, tmp_path / "c", **{key: value})
    shown = repr(float(value)) if type(value) is int else repr(value)
    assert f"{key} is {shown}" in caught.value.what or f"{key} is {value!r}" in caught.value.what


def test_a_long_or_deep_value_is_cut_in_the_message(fixtures: Path, tmp_path: Path) -> None:
    deep: object = []
    for _ in range(500):
        deep = [deep]
    for name, value in (("long", ["x" * 1000] * 1000), ("text", "x" * 500_000), ("deep", deep)):
        with pytest.raises(EdgephiError) as caught:
            spec_of(fixtures / "llama-tied", tmp_path / name, hidden_size=value)
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"is_causal": False}, "is_causal is False"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"rope_theta": -1.0}, r"rope_theta is -1\.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}}, "rope_sc"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000"),
        (
            {
                "original_max_position_embeddings": 32,
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            },
            "original_max_position_embeddings is 32",
        ),
    ],
)
def test_the_route_through_optimum_refuses_what_it_would_read_over(changes: dict[str, object], named: str) -> None:
    check_traced(Config({"model_type": "qwen2", "rms_norm_eps": 1e-6, "some_key": 1}, "config.json"))
    with pytest.raises(UnsupportedModelError, match=named):
        check_traced(Config({"model_type": "qwen2", **changes}, "config.json"))
