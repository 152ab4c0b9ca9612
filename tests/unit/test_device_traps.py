"""What the libraries below swallow in silence, shown beside what edgephi makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_providers import needs

RELU = """
import onnx
from onnx import TensorProto, helper
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
node = helper.make_node("Relu", ["x"], ["y"])
opset = [helper.make_opsetid("", 21)]
model = helper.make_model(helper.make_graph([node], "g", [ends[0]], [ends[1]]), opset_imports=opset, ir_version=10)
model = model.SerializeToString()
"""


def outcome(code: str, **environment: str) -> Any:
    """The last line a process of its own printed, as JSON; registration must not leak into this one."""
    done = subprocess.run(
        [sys.executable, "-c", RELU + code],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "VK_"))} | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs("onnxruntime_qnn")
def test_a_value_that_qnn_accepts_in_silence_is_refused_before_it_gets_there() -> None:
    swallowed, refused = outcome("""
import json, onnxruntime
from edgephi.devices.providers import check_options, register
from edgephi.errors import DeviceError
options = {"backend_type": "htp", "soc_model": "60", "htp_arch": "999", "htp_performence_mode": "burst"}
session = onnxruntime.SessionOptions()
session.add_provider_for_devices([register("qnn")[0].raw], options)
swallowed = onnxruntime.InferenceSession(model, session, enable_fallback=0).get_providers()
try:
    check_options("qnn", options)
    refused = None
except DeviceError as error:
    refused = error.step
print(json.dumps([swallowed, refused]))
""")
    assert "QNNExecutionProvider" in swallowed
    assert refused == "options"


@needs("onnxruntime_qnn")
def test_after_qnn_policies_fail_and_naming_the_device_works() -> None:
    policy, assigned = outcome("""
import json, onnxruntime
from edgephi.devices.providers import register
qnn, = register("qnn")
session = onnxruntime.SessionOptions()
session.set_provider_selection_policy(onnxruntime.OrtExecutionProviderDevicePolicy.PREFER_CPU)
try:
    onnxruntime.InferenceSession(model, session)
    policy = "works"
except Exception:
    policy = "fails"
session = onnxruntime.SessionOptions()
session.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
options = {"backend_type": "htp", "soc_model": "60", "htp_arch": "73", "offload_graph_io_quantization": "0"}
session.add_provider_for_devices([qnn.raw], options)
made = onnxruntime.InferenceSession(model, session, enable_fallback=0)
print(json.dumps([policy, [part.ep_name for part in made.get_provider_graph_assignment_info()]]))
""")
    assert policy == "fails"
    assert assigned == ["QNNExecutionProvider"]


def test_availability_that_og_claims_is_not_believed() -> None:
    claimed, step = outcome("""
import json, onnxruntime_genai
from edgephi.devices import providers
providers.installed_wheel = lambda known: None
try:
    providers.register("openvino")
    step = None
except providers.DeviceError as error:
    step = error.step
print(json.dumps([onnxruntime_genai.is_openvino_available(), step]))
""")
    assert claimed is True
    assert step == "wheel"


LISTED = """
import json
from edgephi.devices.providers import DeviceError, register, registered_devices
try:
    register("webgpu")
    step = None
except DeviceError as error:
    step = error.step
print(json.dumps([step, [device.kind for device in registered_devices() if "WebGpu" in device.provider]]))
"""


@needs("onnxruntime_ep_webgpu")
@pytest.mark.skipif(sys.platform != "linux", reason="the software driver is Linux's")
def test_a_software_gpu_that_is_listed_without_its_driver_is_refused(tmp_path: Path) -> None:
    driver = str(tmp_path / "lvp_absent.json")
    step, kinds = outcome(LISTED, ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER="1", VK_DRIVER_FILES=driver)
    if "gpu" in kinds:
        pytest.skip("this machine has a GPU")
    assert kinds == ["gpu-software"]
    assert step == "driver"


@needs("onnxruntime_ep_openvino")
def test_a_provider_that_registers_without_a_device_is_an_error() -> None:
    step, kinds = outcome(LISTED.replace("webgpu", "openvino").replace("WebGpu", "OpenVINO"))
    assert (step == "device") == (kinds == [])
