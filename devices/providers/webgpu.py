"""Any GPU with Vulkan, Direct3D 12 or Metal, through WebGPU (Dawn); on Linux also Mesa's software Vulkan, for tests.

Source of the options: microsoft/onnxruntime, core/providers/webgpu/webgpu_provider_options.h. What its graph may hold
was found by running it on that software Vulkan.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from edgephi.devices.providers.base import DeviceInfo, GraphTraits, PowerOption, Provider
from edgephi.devices.providers.options import SWITCH, Allowed, OneOf, Whole
from edgephi.devices.providers.vulkan import check_software_vulkan, software_vulkan

SOFTWARE_GPU = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
"""Environment variable without which WebGPU refuses a Vulkan driver that computes on the CPU."""

_BUFFER_CACHE = OneOf(("disabled", "lazyRelease", "simple", "bucket"))

OPTIONS: Mapping[str, Allowed] = {
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


def check_devices(devices: Sequence[DeviceInfo]) -> None:
    """The software driver is listed wherever it is allowed, whether it is there or not; raises DeviceError."""
    if sys.platform == "linux" and not any(device.is_hardware for device in devices):
        check_software_vulkan(software_vulkan())


def check_driver() -> None:
    """Raises DeviceError for a software driver that is there and too old; without one there is nothing to say."""
    if sys.platform == "linux" and (found := software_vulkan()).library is not None:
        check_software_vulkan(found)


def allow_software() -> str | None:
    """What helps where no GPU is listed."""
    if os.environ.get(SOFTWARE_GPU) == "1":
        return None
    return (
        "Install the GPU's driver; to compute on the CPU through Mesa's software Vulkan, for tests, "
        f"set {SOFTWARE_GPU}=1"
    )


WEBGPU = Provider(
    name="WebGpuExecutionProvider",
    short="webgpu",
    title="WebGPU",
    wheels=("onnxruntime-ep-webgpu",),
    module="onnxruntime_ep_webgpu",
    extra="webgpu",
    genai_name="webgpu",
    options=OPTIONS,
    power=PowerOption(
        "powerPreference",
        {"performance": "high-performance", "balanced": "high-performance", "saver": "low-power"},
    ),
    device_class="gpu",
    stand_in="gpu-software",
    profile="webgpu-gpu",
    graph=GraphTraits(
        # half the KV cache, and on a GPU with float16 units up to half the time
        float_type="float16",
        exact_in_float32=True,
        row_numbers=False,  # its GroupQueryAttention takes the input position_ids and does not read it
        experts=False,  # "zero_points for QMoE are not yet supported"
        block_sparse=False,  # not tried
        sliding_window=True,
        last_row=True,  # the head of 200,064 rows is a sixth of the products of Phi-4-mini's prompt
        partial_blocks=True,
    ),
    no_device=allow_software,
    check_devices=check_devices,
    check_driver=check_driver,
)
