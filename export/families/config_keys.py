"""Which keys a folder's config.json may have: all that are read, and those that change nothing.

The rule is that of `export/checkpoint/gguf_keys.py`. A key that a family reads is read; a key known to change what some
decoder computes must have the value that changes nothing; a key known to describe training, generation, tokens or the
saving program may say anything; any other key is refused unless it is null or empty. Silence about a key would be a
wrong answer without a word, and a person who knows that a key means nothing can take it out of the file.

Sources of the names: transformers 4.57 and 5.23, configuration_utils.py, generation/configuration_utils.py and the
configurations of the families; the config.json of published models and of those that fine-tuning tools save.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgephi.errors import UnsupportedModelError
from edgephi.export.checkpoint.config import Config, shown
from edgephi.export.families.rope import ORIGINAL, scaling_section, stated_once, type_key
from edgephi.export.families.sizes import SAME_ACTIVATION
from edgephi.export.spec import DecoderSpec

_SIZES = {
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}
_PHI3 = {"attention_bias", "lm_head_bias", "mlp_bias", "original_max_position_embeddings", "rms_norm_eps"}
_READ: Mapping[str, set[str]] = {
    "llama": _SIZES | {"attention_bias", "mlp_bias", "rms_norm_eps"},
    "phi": _SIZES | {"layer_norm_eps", "qk_layernorm"},
    "phi3": _SIZES | _PHI3 | {"sliding_window"},
    "phi4mm": _SIZES | _PHI3 | {"sliding_window"},
    "phi3small": _SIZES
    | {
        "blocksparse_block_size",
        "blocksparse_homo_head_pattern",
        "blocksparse_num_local_blocks",
        "blocksparse_vert_stride",
        "dense_attention_every_n_layers",
        "dummy_token_indices",
        "ff_dim_multiplier",
        "ff_intermediate_size",
        "gegelu_limit",
        "layer_norm_epsilon",
        "mup_attn_multiplier",
        "mup_embedding_multiplier",
        "mup_use_scaling",
        "mup_width_multiplier",
        "original_max_position_embeddings",
        "rope_embedding_base",
        "rope_position_scale",
    },
    "phimoe": _SIZES
    | (_PHI3 - {"mlp_bias"})
    | {"num_experts_per_tok", "num_local_experts", "router_jitter_noise", "sliding_window"},
}

# biases are tensors: one that is there and not read is refused by its name, one that is missing as well
_WITHOUT_EFFECT = {
    # the program that saved the file, and what it was asked for
    "architectures", "attn_impl", "attn_implementation", "auto_map", "base_model", "base_model_name_or_path",
    "custom_pipelines", "device_map", "dtype", "experts_implementation", "is_composition", "is_llama_config",
    "library_name", "license", "model_id", "model_name", "name", "name_or_path", "params_dtype", "pipeline_tag", "tags",
    "torch_dtype", "trust_remote_code", "use_bfloat16",
    # what a call returns, how much memory it takes, which kernel computes it
    "attention_softmax_in_fp32", "base_model_pp_plan", "base_model_tp_plan", "chunk_size_feed_forward", "flash_attn",
    "flash_rotary", "fp32_residual_connection", "fused_dense", "gradient_checkpointing", "pp_plan", "tp_plan",
    "is_decoder", "keys_to_ignore_at_inference", "output_attentions", "output_hidden_states",
    "output_router_logits", "reorder_and_upcast_attn", "residual_dtype", "residual_in_fp32", "return_dict",
    "sequence_parallel", "tie_encoder_decoder", "tie_last_hidden_states", "torchscript", "use_cache", "use_flash_attn",
    "use_flash_attention", "use_flash_attention_2", "use_kernels", "use_liger_kernel", "use_reentrant_checkpointing",
    "use_return_dict", "use_sdpa", "use_xformers",
    # tensor parallel products are the same products; transformers has ignored the key since 4.50
    "pretraining_tp", "tensor_parallel", "tp_size",
    # training, LongLoRA's shifted attention and adapters that are merged or refused by their tensors among it
    "fan_in_fan_out", "group_size_ratio", "init_lora_weights", "layers_to_transform", "modules_to_save",
    "normalize_reward", "target_modules", "value_head_prefix", "z_loss_enabled",
    "gradient_checkpointing_kwargs", "initializer_factor", "initializer_range", "input_jitter_noise", "label_smoothing",
    "loss_type", "neftune_noise_alpha", "rescale_layer", "router_z_loss_coef", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "use_unsloth", "z_loss",
    # classifiers on top of the decoder: their tensors are refused by name
    "classifier_activation", "classifier_bias", "finetuning_task", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "tf_legacy_loss",
    # tokens and generation
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "cache_config", "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile",
    "dola_layers", "is_assistant", "low_memory", "max_cache_len", "max_matching_ngram_size", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "speculation_type", "target_lookbehind", "use_mtp", "use_model_defaults",
    "bad_words_ids", "begin_suppress_tokens", "bos_token", "chat_template", "constraints", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids", "guidance_scale",
    "length_penalty", "max_length", "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_logits", "output_scores", "pad_token", "penalty_alpha", "prefix",
    "remove_invalid_values", "renormalize_logits", "repetition_penalty", "return_dict_in_generate", "sequence_bias",
    "stop_strings", "suppress_tokens", "temperature", "token_healing", "top_h", "top_k", "top_p", "typical_p",
    "unk_token", "watermarking_config",
    # lengths: the tables are as long as max_position_embeddings, and only LongRoPE asks for the original one
    "max_sequence_length", "max_seq_len", "max_seq_length", "model_max_length", "n_ctx", "n_positions",
    "original_max_position_embeddings", "seq_len", "seq_length",
    # parts of published Phi checkpoints that text does not meet, or that the published code does not read
    "pad_sequence_to_multiple_of_64", "audio_processor", "blocksparse_triton_kernel_block_size", "embd_layer",
    "gegelu_pad_to_256", "img_processor",
    "speech_lora", "vision_lora",
}  # fmt: skip
_WITHOUT_EFFECT_PATTERN = re.compile(
    r"_.*|unsloth.*|transformers\.js.*|tokenizer_.*|generation_.*|training_.*|lora_.*|peft_.*|trl_.*"
    r"|.*_version|.*_token_ids?|.*_token_index|.*_bias"
    r"|(.*_)?dropout|.*_dropout_(prob|p)|.*_pdrop|.*aux_loss_coef"
)

_OFF = (None, False, 0, 0.0)
_ONE = (1, 1.0)
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": _OFF,
    "alibi": _OFF,
    "attention_chunk_size": _OFF,
    "attn_logit_softcap": _OFF,
    "attn_logit_softcapping": _OFF,
    "attn_temperature_tuning": _OFF,
    "clip_qkv": _OFF,
    "cross_attention_hidden_size": (),
    "embedding_multiplier": _ONE,
    "embedding_scale": _ONE,
    "final_logit_softcap": _OFF,
    "final_logit_softcapping": _OFF,
    "full_attn_mod": _ONE,
    "interpolate_factor": _ONE,
    "is_causal": (True,),
    "is_encoder_decoder": _OFF,
    "lm_head_multiplier": _ONE,
    "logit_scale": _ONE,
    "logit_softcap": _OFF,
    "logits_scaling": _ONE,
    "mlp_type": ("swiglu", "gated"),
    "multi_query": _OFF,
    "n_routed_experts": _OFF,
    "new_decoder_architecture": _OFF,
    "no_rope_layer_interval": _OFF,
    "no_rope_layers": _OFF,
    "norm_type": ("rmsnorm", "rms_norm"),
    "num_experts": _OFF,
    "num_experts_per_tok": _OFF,
    "num_local_experts": _OFF,
    "num_nextn_predict_layers": _OFF,
    "position_embedding_type": ("rope", "rotary"),
    "pruned_heads": (),
    "qk_layer_norms": _OFF,
    "qk_layernorm": _OFF,
    "qk_norm": _OFF,
    "residual_multiplier": _ONE,
    "residual_scale": _ONE,
    "rms_norm": (True,),
    "rope": (True,),
    "rope_interleaved": _OFF,
    "rope_pct": _ONE,
    "rotary_pct": _ONE,
    "scale_attn_by_inverse_layer_idx": _OFF,
    "scale_attn_weights": (True,),
    "scale_emb": _ONE,
    "scale_embedding": _OFF,
    "sliding_window_pattern": _OFF,
    "use_alibi": _OFF,
    "use_bidirectional_attention": _OFF,
    "use_mup": _OFF,
    "use_qk_norm": _OFF,
    "use_resampler": _OFF,
    "use_rope": (True,),
}
"""Keys that change what a decoder computes, with the values that do not; null and empty ones never do."""

_OTHER_NAMES = {
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
}  # fmt: skip
_EPSILONS = {"layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "rms_norm_eps"}
_DECIDED_LATER = (
    _EPSILONS
    | _OTHER_NAMES.keys()
    | {
        "activation",
        "activation_function",
        "attention_multiplier",
        "hidden_activation",
        "layer_types",
        "max_window_layers",
        "parallel_attn",
        "parallel_residual",
        "query_pre_attn_scalar",
        "rotary_dim",
        "sliding_window",
        "use_parallel_residual",
        "use_sliding_window",
    }
)
"""Neutral or not as the rest of the configuration says; see `_contradicts`."""

_KNOWS_BETTER = (
    "If it changes nothing about what the model computes, remove it from the file; otherwise use a checkpoint of a "
    "supported architecture"
)


def check_keys(config: Config, family: str, spec: DecoderSpec) -> None:
    """Refuse a model that states more about its computation than edgephi builds.

    Args:
        family: `model_type`.
        spec: what the family made of the configuration.

    Raises:
        UnsupportedModelError: naming the key and its value.
    """
    for key, value in config.values.items():
        if key in _READ[family] or value is None or (isinstance(value, str | list | dict) and not value):
            continue
        if key in _DECIDED_LATER:
            if reason := _contradicts(config, family, key, value, spec):
                raise config.refusal(key, value, reason)
        elif key in _NEUTRAL:
            # not `in`, which takes True for 1
            if not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL[key]):
                only = " or ".join(repr(each) for each in _NEUTRAL[key] if each is not None) or "an empty value"
                raise config.refusal(key, value, f"edgephi builds {only} only")
        elif key not in _WITHOUT_EFFECT and not _WITHOUT_EFFECT_PATTERN.fullmatch(key):
            raise UnsupportedModelError(
                f"{shown(key)[1:-1]} is {shown(value)}: edgephi does not know this key",
                where=config.where,
                remedy=_KNOWS_BETTER,
            )


def check_traced(config: Config) -> None:
    """Refuse what transformers 4.57, which traces other families, would read over or compute nonsense with.

    Raises:
        UnsupportedModelError: naming the key and its value.
    """
    for key in ("is_causal", "per_layer_config"):  # transformers 5 reads these
        value = config.values.get(key)
        if value not in (None, True, {}):
            raise config.refusal(key, value, "transformers 4.57, which traces the model, does not know it")
    for key in _EPSILONS | {"rope_theta", "partial_rotary_factor"}:
        if config.has(key):
            config.positive(key)
    stated_once(config, "rope_theta")
    stated_once(config, "partial_rotary_factor")
    section = scaling_section(config)
    if section is not None:
        if section.text(type_key(section), "default") not in ("default", "linear", "dynamic"):
            stated_once(config, ORIGINAL)
        for key in ("factor", "rope_theta", "partial_rotary_factor", "attention_factor"):
            if section.has(key):
                section.positive(key)


def _contradicts(config: Config, family: str, key: str, value: object, spec: DecoderSpec) -> str | None:
    """Why a key does not go with the decoder; None: it does."""
    window = spec.sliding_window
    match key:
        case _ if key in _EPSILONS:  # another family's word for it
            (own,) = _EPSILONS & _READ[family]
            return None if config.has(own) else f"{family} models have {own}"
        case _ if key in _OTHER_NAMES:  # as the first Phi and GPT-2 have them
            own = _OTHER_NAMES[key]
            return None if value == config.values.get(own) else f"{own} is {shown(config.values.get(own))}"
        case "rotary_dim":
            return None if value == spec.rope.dim else f"{spec.rope.dim} channels of a head are rotated"
        case "sliding_window":  # of a family that has none
            fits = isinstance(value, int) and value >= spec.context_length
            return None if fits or config.values.get("use_sliding_window") is False else "this family has no window"
        case "use_sliding_window":
            return f"sliding_window is {window}" if window and value is not True else None
        case "max_window_layers":
            return f"every layer of this family has the window of {window}" if window and value != 0 else None
        case "layer_types":
            kind = "sliding_attention" if window else "full_attention"
            same = isinstance(value, list) and all(each == kind for each in value)
            return None if same else f"all layers are built with {kind}"
        case "activation" | "activation_function" | "hidden_activation":
            gated = key == "activation" and value == "swiglu" and spec.mlp == "gated_silu"  # as Falcon 3 has it
            stated = config.values.get("hidden_act")
            same = any(value in names and stated in names for names in SAME_ACTIVATION.values())
            return None if gated or same or value == stated else "hidden_act says otherwise"
        case "attention_multiplier":
            exact = spec.head_dim**-0.5
            near = isinstance(value, float) and abs(value - exact) <= 1e-6 * exact
            return None if near else f"scores are multiplied by 1 / sqrt({spec.head_dim})"
        case "query_pre_attn_scalar":
            return None if value == spec.head_dim else f"scores are divided by sqrt({spec.head_dim})"
        case _:  # parallel attention and MLP, by three names
            return None if value is spec.parallel else f"{spec.family} models are built with {spec.parallel}"
