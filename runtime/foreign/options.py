"""Which settings of a stranger's genai_config.json are known to be harmless; the others are refused by name.

onnxruntime-genai hands every session option that it does not know to onnxruntime, and every provider option to the
provider. Some load a library, some write a file wherever they are told to, so a list of what is allowed is the only one
that does not miss one.

Sources: microsoft/onnxruntime-genai, src/config.cpp, src/models/model.cpp (an `enable_profiling` of "" writes a file
too); microsoft/onnxruntime, include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h, and the options
of each provider under onnxruntime/core/providers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgephi.devices.providers import all_providers
from edgephi.devices.providers.options import FilePath

OPTION_SECTIONS = frozenset({"session_options", "run_options"})
HARMLESS_OPTIONS = frozenset(
    {
        "config_entries",
        "disable_cpu_ep_fallback",
        "disable_quant_qdq",
        "enable_cpu_mem_arena",
        "enable_mem_pattern",
        "enable_quant_qdq_cleanup",
        "ep.context_embed_mode",
        "ep.context_enable",
        "ep.share_ep_contexts",
        "ep.stop_share_ep_contexts",
        "ep_context_embed_mode",
        "ep_context_enable",
        "graph_optimization_level",
        "inter_op_num_threads",
        "intra_op_num_threads",
        "log_id",
        "log_severity_level",
        "log_verbosity_level",
        "mlas.disable_kleidiai",
        "mlas.enable_gemm_fastmath_arm64_bfloat16",
        "optimization.disable_specified_optimizers",
        "optimization.enable_gelu_approximation",
        "provider_options",
        "session.disable_aot_function_inlining",
        "session.disable_cpu_ep_fallback",
        "session.disable_prepacking",
        "session.disable_quant_qdq",
        "session.dynamic_block_base",
        "session.enable_quant_qdq_cleanup",
        "session.force_spinning_stop",
        "session.inter_op.allow_spinning",
        "session.intra_op.allow_spinning",
        "session.intra_op_thread_affinities",
        "session.qdq_matmulnbits_accuracy_level",
        "session.set_denormal_as_zero",
        "session.use_device_allocator_for_initializers",
        "session.use_env_allocators",
        "use_env_allocators",
    }
)
"""Session options that neither load code nor name a file; onnxruntime takes any other key as well."""
HARMLESS_OF_PROVIDERS = frozenset(
    {
        "AllowLowPrecisionAccumulationOnGPU",
        "EnableOnSubgraphs",
        "MLComputeUnits",
        "ModelFormat",
        "RequireStaticInputShapes",
        "SpecializationStrategy",
        "arena_extend_strategy",
        "cudnn_conv1d_pad_to_nc1d",
        "cudnn_conv_algo_search",
        "cudnn_conv_use_max_workspace",
        "device_filter",
        "device_filtering_options",
        "device_id",
        "device_index",
        "device_type",
        "disable_metacommands",
        "do_copy_in_default_stream",
        "enable_cuda_graph",
        "enable_graph_capture",
        "enable_hip_graph",
        "enable_skip_layer_norm_strict_mode",
        "fuse_conv_bias",
        "gpu_mem_limit",
        "hardware_device_id",
        "hardware_device_type",
        "hardware_vendor_id",
        "intra_op_num_threads",
        "miopen_conv_exhaustive_search",
        "miopen_conv_use_max_workspace",
        "name",
        "options",
        "performance_preference",
        "prefer_nhwc",
        "sdpa_kernel",
        "tunable_op_enable",
        "tunable_op_max_tuning_duration_ms",
        "tunable_op_tuning_enable",
        "use_ep_level_unified_stream",
        "use_tf32",
    }
)
"""Options of providers that edgephi has no table of: numbers, switches and words. Left out are paths (CoreML's
ModelCacheDirectory) and addresses (CUDA's user_compute_stream, gpu_external_alloc)."""
CODE_KEYS = frozenset({"custom_ops_library", "library_path", "backend_path", "op_packages"})
"""A shared library is loaded from where these say, wherever they stand."""


def refused_keys(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """What in a configuration is not known to be harmless: session and provider options, and code wherever it stands.

    Returns:
        (key with those above it, why), in the file's order.
    """
    if isinstance(value, list):
        for inner in value:
            yield from refused_keys(inner, place)
    elif isinstance(value, dict):
        for key, inner in value.items():
            path = f"{place}:{key}" if place else key
            if key in CODE_KEYS:
                yield path, f"the configuration names a library to load: {key}"
            elif key in OPTION_SECTIONS:
                yield from _refused_options(inner, path)
            elif key == "provider_options":
                yield from _refused_of_providers(inner, path)
            else:
                yield from refused_keys(inner, path)


def _refused_options(options: object, place: str) -> Iterator[tuple[str, str]]:
    for part in dictionaries([options]):
        for key, value in part.items():
            path = f"{place}:{key}"
            if key == "config_entries":
                yield from _refused_options(value, path)
            elif key == "provider_options":
                yield from _refused_of_providers(value, path)
            elif key in CODE_KEYS:
                yield path, f"the configuration names a library to load: {key}"
            elif key not in HARMLESS_OPTIONS or not isinstance(value, str | int | float):
                yield path, f"the configuration sets {key}, which is not known to be harmless: it may name a file"


def _refused_of_providers(providers: object, place: str) -> Iterator[tuple[str, str]]:
    """`provider_options` is a list of objects, a provider's name the key of each."""
    tables = {known.genai_name: known.options for known in all_providers() if known.genai_name}
    for part in dictionaries([providers]):
        for name, options in part.items():
            known = tables.get(name.casefold(), {})
            for inner in dictionaries([options]):
                for key in inner:
                    table = known.get(key)
                    if key not in HARMLESS_OF_PROVIDERS and (table is None or isinstance(table, FilePath)):
                        path = f"{place}:{name}:{key}"
                        kind = "names a library to load" if key in CODE_KEYS else "sets an option of a provider"
                        yield path, f"the configuration {kind}: {key}, which is not known to be harmless"


def dictionaries(places: list[Any]) -> Iterator[dict[str, Any]]:
    for one in places:
        if isinstance(one, dict):
            yield one
        elif isinstance(one, list):
            yield from dictionaries(one)
