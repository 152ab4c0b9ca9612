"""Qualcomm's Hexagon NPU, through QNN.

The wheel brings the compiler, and on x86 a simulator of the NPU: it lists a CPU.

Source of the options: onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgephi.devices.providers.base import PowerOption, Provider
from edgephi.devices.providers.options import DUMP, MANY, SWITCH, Allowed, FilePath, OneOf, Whole
from edgephi.errors import DeviceError

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

OPTIONS: Mapping[str, Allowed] = {
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
    "rpc_control_latency": Whole(0, MANY),
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
    "profiling_file_path": DUMP,
    "dump_json_qnn_graph": SWITCH,
    "json_qnn_graph_dir": DUMP,
    "dump_qnn_ir_dlc": SWITCH,
    "dump_qnn_ir_dlc_dir": DUMP,
    "enable_framework_op_trace": SWITCH,
    "framework_op_trace_dir": DUMP,
}


def uses_htp(options: Mapping[str, str]) -> bool:
    """Whether options ask for the NPU, which is the default, and not for another of QNN's backends."""
    return options.get("backend_type", "htp") == "htp"


def check_htp(options: Mapping[str, str], where: object = None) -> None:
    """QNN's NPU backend is told which chip it compiles for, consistently.

    Without `soc_model` float graphs run in float32 on the simulator, which hides the error of the NPU's float16.

    Raises:
        DeviceError: chip or architecture missing, or contradicting each other; step `options`.
    """
    if not uses_htp(options):
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


QNN = Provider(
    name="QNNExecutionProvider",
    short="qnn",
    title="QNN",
    wheels=("onnxruntime-qnn",),
    module="onnxruntime_qnn",
    extra="qnn",
    genai_name="qnn",
    options=OPTIONS,
    check=check_htp,
    power=PowerOption(
        "htp_performance_mode",
        {"performance": "burst", "balanced": "balanced", "saver": "power_saver"},
        applies=uses_htp,
    ),
    device_class="npu",
    stand_in="npu-simulator",
    profile="snapdragon-x-elite",
    compiled=True,
    hardware="a Qualcomm Snapdragon",
)
