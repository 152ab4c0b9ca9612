"""Intel's CPUs, GPUs and NPUs, through OpenVINO. edgephi builds no graph for it: it wants constant embeddings.

Source of the options: microsoft/onnxruntime, core/providers/openvino/openvino_provider_factory.cc.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgephi.devices.providers.base import Provider
from edgephi.devices.providers.options import DUMP, WORD, Allowed, OneOf, Whole

OPTIONS: Mapping[str, Allowed] = {
    "num_of_threads": Whole(1, 1024),
    "num_streams": Whole(1, 1024),
    "cache_dir": DUMP,
    "model_priority": OneOf(("LOW", "MEDIUM", "HIGH", "DEFAULT")),
    "enable_opencl_throttling": WORD,
    "enable_qdq_optimizer": WORD,
    "enable_causallm": WORD,
}

OPENVINO = Provider(
    name="OpenVINOExecutionProvider",
    short="openvino",
    title="OpenVINO",
    wheels=("onnxruntime-ep-openvino",),
    module="onnxruntime_ep_openvino",
    extra="openvino",
    genai_name="openvino",
    options=OPTIONS,
    hardware="an Intel CPU, GPU or NPU",
)
