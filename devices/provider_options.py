"""Which options an execution provider knows, and which values they take.

onnxruntime hands options to providers as strings. Providers accept misspelt names and impossible values without a word
(QNN 2.7.0: `htp_arch=999`), so what reaches them is checked here first. Options that name a library to load or carry a
pointer (QNN's `backend_path` and `op_packages`, WebGPU's `webgpuDevice`) are left out: a profile may be a stranger's.

Sources: onnxruntime-qnn's docs/execution_providers/QNN-ExecutionProvider.md; onnxruntime's
core/providers/webgpu/webgpu_provider_options.h, core/providers/openvino/openvino_provider_factory.cc and
core/providers/dml/dml_provider_factory_creator.h. Every name of the first three occurs in the library of the wheel
that edgephi pins; DirectML's wheel, for Windows only, was not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from edgephi.errors import DeviceError


@dataclass(frozen=True)
class OneOf:
    """A value out of a list, spelt exactly so."""

    values: tuple[str, ...]

    def accepts(self, value: str) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(self.values)


@dataclass(frozen=True)
class Whole:
    """A decimal whole number, bounds included."""

    low: int
    high: int

    def accepts(self, value: str) -> bool:
        return value.isascii() and value.isdigit() and len(value) < 20 and self.low <= int(value) <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class FilePath:
    """A path; one that is read has to exist, one that is written need not."""

    exists: bool

    def accepts(self, value: str) -> bool:
        plain = bool(value) and all(ord(c) >= 32 for c in value)
        return plain and (not self.exists or Path(value).is_file())

    def __str__(self) -> str:
        return "a file that exists" if self.exists else "a path"


Allowed = OneOf | Whole | FilePath
SWITCH = OneOf(("0", "1"))
_WORD = OneOf(("true", "false"))
_DUMP = FilePath(exists=False)
_BUFFER_CACHE = OneOf(("disabled", "lazyRelease", "simple", "bucket"))
_MANY = 2**31 - 1

# executorch, backends/qualcomm/serialization/qc_schema.py (SM8450 to SM8850). 60 and 88 are the numbers that users
# report from Snapdragon X (SC8380XP) and X2 Elite (SC8480XP) PCs; not run there. The compiler of onnxruntime-qnn 2.7.0
# takes every pair below and does not know 37 or 55 at all, but it takes a wrong pair (60 with 75) as readily.
HTP_ARCHITECTURES = {
    "30": "68",
    "36": "69",
    "42": "69",
    "43": "73",
    "57": "75",
    "60": "73",
    "69": "79",
    "87": "81",
    "88": "81",
}
"""SoC model number → Hexagon (HTP) architecture."""

QNN: Mapping[str, Allowed] = {
    "backend_type": OneOf(("htp", "gpu", "cpu", "saver", "ir")),
    "soc_model": Whole(1, 999),
    "htp_arch": OneOf(("68", "69", "73", "75", "79", "81")),
    "device_id": Whole(0, 255),
    "htp_performance_mode": OneOf(
        (
            "burst",
            "balanced",
            "default",
            "high_performance",
            "high_power_saver",
            "low_balanced",
            "low_power_saver",
            "power_saver",
            "extreme_power_saver",
            "sustained_high_performance",
        )
    ),
    "htp_graph_finalization_optimization_mode": OneOf(("0", "1", "2", "3")),
    "qnn_context_priority": OneOf(("low", "normal", "normal_high", "high")),
    "rpc_control_latency": Whole(0, _MANY),
    "vtcm_mb": Whole(0, 64),
    "num_graph_prepare_threads": Whole(2, 1024),
    "offload_graph_io_quantization": SWITCH,
    "enable_htp_fp16_precision": SWITCH,
    "htp_bf16_enable": SWITCH,
    "enable_htp_spill_fill_buffer": SWITCH,
    "enable_htp_shared_memory_allocator": SWITCH,
    "enable_htp_prepare_only": SWITCH,
    "enable_vtcm_backup_buffer_sharing": SWITCH,
    "htp_share_resource_optimization": OneOf(("1",)),
    "enable_block_quant_weight_optimization": SWITCH,
    "disable_file_mapped_weights": SWITCH,
    "extended_udma": SWITCH,
    "skip_qnn_version_check": SWITCH,
    "op_affinity": FilePath(exists=True),
    "profiling_level": OneOf(("off", "basic", "detailed", "optrace")),
    "profiling_file_path": _DUMP,
    "dump_json_qnn_graph": SWITCH,
    "json_qnn_graph_dir": _DUMP,
    "dump_qnn_ir_dlc": SWITCH,
    "dump_qnn_ir_dlc_dir": _DUMP,
    "enable_framework_op_trace": SWITCH,
    "framework_op_trace_dir": _DUMP,
}

WEBGPU: Mapping[str, Allowed] = {
    "dawnBackendType": OneOf(("Vulkan", "D3D12")),
    "powerPreference": OneOf(("high-performance", "low-power")),
    "preferredLayout": OneOf(("NHWC", "NCHW")),
    "enableGraphCapture": SWITCH,
    "enableInt64": SWITCH,
    "enableRobustness": SWITCH,
    "enablePIXCapture": SWITCH,
    "preserveDevice": SWITCH,
    "validationMode": OneOf(("disabled", "wgpuOnly", "basic", "full")),
    "kvCacheQuantizationBits": OneOf(("0", "4")),
    "deviceId": Whole(0, 255),
    "sessionBufferPoolGenerations": Whole(0, 1024),
    "maxStorageBufferBindingSize": Whole(1, 2**40),
    "maxNumPendingDispatches": Whole(1, 4096),
    "storageBufferCacheMode": _BUFFER_CACHE,
    "uniformBufferCacheMode": _BUFFER_CACHE,
    "queryResolveBufferCacheMode": _BUFFER_CACHE,
    "defaultBufferCacheMode": _BUFFER_CACHE,
}

OPENVINO: Mapping[str, Allowed] = {
    "num_of_threads": Whole(1, 1024),
    "num_streams": Whole(1, 1024),
    "cache_dir": _DUMP,
    "model_priority": OneOf(("LOW", "MEDIUM", "HIGH", "DEFAULT")),
    "enable_opencl_throttling": _WORD,
    "enable_qdq_optimizer": _WORD,
    "enable_causallm": _WORD,
}

DIRECTML: Mapping[str, Allowed] = {
    "device_id": Whole(0, 255),
    "device_filter": OneOf(("gpu", "npu", "any")),
    "performance_preference": OneOf(("default", "high_performance", "minimum_power")),
    "disable_metacommands": _WORD,
    "enable_graph_capture": _WORD,
}


def check_against(name: str, known: Mapping[str, Allowed], options: Mapping[str, str], where: object = None) -> None:
    """Hold options against the table of one provider.

    Args:
        name: the provider, for the sentence.
        where: the profile the options come from.

    Raises:
        DeviceError: an option or value the table does not have; step `options`.
    """
    for option, value in options.items():
        allowed = known.get(option)
        if allowed is None:
            near = get_close_matches(option, known, n=1)
            advice = f"Write {near[0]}" if near else f"Leave it out; known are {', '.join(sorted(known)) or 'none'}"
            raise DeviceError(f"{name} has no option {option!r}", where=where, remedy=advice, step="options")
        if not isinstance(value, str) or not allowed.accepts(value):
            raise DeviceError(
                f"{name} takes no {option}={value!r}", where=where, remedy=f"Use {allowed}, as text", step="options"
            )


def check_htp(options: Mapping[str, str], where: object = None) -> None:
    """QNN's NPU backend is told which chip it compiles for, consistently.

    Without `soc_model` float graphs run in float32 on the simulator, which hides the error of the NPU's float16.

    Raises:
        DeviceError: chip or architecture missing, or contradicting each other; step `options`.
    """
    if options.get("backend_type", "htp") != "htp":
        return
    for option in ("soc_model", "htp_arch"):
        if option not in options:
            raise DeviceError(
                f"QNNExecutionProvider is not told the chip: {option} is missing",
                where=where,
                remedy="Take soc_model and htp_arch from the profile of the device; Snapdragon X Elite is 60 and 73",
                step="options",
            )
    expected = HTP_ARCHITECTURES.get(options["soc_model"])
    if expected is not None and options["htp_arch"] != expected:
        raise DeviceError(
            f"soc_model {options['soc_model']} has HTP architecture {expected}, not {options['htp_arch']}",
            where=where,
            remedy=f"Set htp_arch to {expected}",
            step="options",
        )
