"""A DirectX 12 GPU on Windows, through DirectML. Not run here: its wheels are for Windows only.

Source of the options: microsoft/onnxruntime, core/providers/dml/dml_provider_factory_creator.h; DirectML's wheel was
not looked at. Source of what its graph may hold: the same, core/providers/dml/DmlExecutionProvider/src/Operators.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

from edgephi.devices.providers.base import GraphTraits, PowerOption, Provider
from edgephi.devices.providers.options import WORD, Allowed, OneOf, Whole

OPTIONS: Mapping[str, Allowed] = {
    "device_id": Whole(0, 255),
    "device_filter": OneOf(("gpu", "npu", "any")),
    "performance_preference": OneOf(("default", "high_performance", "minimum_power")),
    "disable_metacommands": WORD,
    "enable_graph_capture": WORD,
}


def requirements_file() -> Path:
    """The wheels with DirectML for a Windows PC of this architecture; they replace the core ones."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    name = "windowsml-windows-arm64.txt" if arm else "directml-windows-x64.txt"
    return Path(__file__).parents[1] / "requirements" / name


DIRECTML = Provider(
    name="DmlExecutionProvider",
    short="directml",
    title="DirectML",
    wheels=("onnxruntime-directml", "onnxruntime-windowsml"),
    requirements=requirements_file,
    aliases=("dml",),
    genai_name="dml",
    options=OPTIONS,
    power=PowerOption(
        "performance_preference",
        {"performance": "high_performance", "balanced": "default", "saver": "minimum_power"},
    ),
    device_class="gpu",
    profile="directml-gpu",
    graph=GraphTraits(
        float_type="float16",
        separate_attention=True,  # DmlOperatorGroupQueryAttention takes neither packed nor unrotated input
        row_numbers=True,  # RotaryEmbedding takes them
        whole_prompts=True,  # the same operator
        experts=False,  # there is no QMoE
        block_sparse=False,  # its attention takes no bias
        sliding_window=False,  # DmlOperatorGroupQueryAttention reads no such attribute and would attend to everything
        partial_blocks=False,  # QueryMatMulNBits takes whole blocks only
    ),
    hardware="a DirectX 12 GPU",
    only_on="win32",
    elsewhere="Use webgpu: DirectML is a part of Windows",
)
