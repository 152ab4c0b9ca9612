"""Registering providers: each step that can fail says which it was; the list decides what a device is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgephi.devices import providers
from edgephi.errors import DeviceError
from edgephi.installed import install_extra

PROJECT = Path(__file__).resolve().parents[2]


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def in_a_process_of_its_own(code: str, **environment: str) -> str:
    """Registration cannot be undone: QNN's breaks onnxruntime's selection policies for the rest of the process."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "", **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cpu_needs_no_registration() -> None:
    (device,) = providers.register("cpu")
    assert (device.provider, device.kind, device.is_hardware) == ("CPUExecutionProvider", "cpu", True)


def test_a_missing_wheel_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "installed_wheel", lambda known: None)
    with pytest.raises(DeviceError, match=re.escape(install_extra("webgpu"))) as missing:
        providers.register("webgpu")
    assert missing.value.step == "wheel"


def test_a_library_that_does_not_load_is_an_error_of_its_own(tmp_path: Path) -> None:
    """The QNN wheel is there, its library is not one. Where a test has registered the true one, nothing is loaded."""
    (tmp_path / "broken.so").write_bytes(b"not a library")
    code = f"""
import sys
from types import ModuleType
from edgephi.devices import providers
from edgephi.errors import DeviceError
module = ModuleType("onnxruntime_qnn")
module.get_library_path = lambda: {str(tmp_path / "broken.so")!r}
sys.modules["onnxruntime_qnn"] = module
providers.installed_wheel = lambda known: ("onnxruntime-qnn", "2.7.0")
try:
    providers.register("qnn")
except DeviceError as error:
    print("does not load" in error.what, error.step, error.where, sep=", ")
"""
    assert in_a_process_of_its_own(code) == "True, library, onnxruntime-qnn 2.7.0"


@needs("onnxruntime_ep_webgpu")
def test_a_provider_without_a_device_is_not_taken_for_one() -> None:
    code = """
from edgephi.devices.providers import register
from edgephi.errors import DeviceError
try:
    found = register("webgpu")
    print("gpu" if all(device.kind == "gpu" for device in found) else found)
except DeviceError as error:
    print(error.step, error.remedy)
"""
    said = in_a_process_of_its_own(code)
    assert said == "gpu" or (said.startswith("device ") and providers.SOFTWARE_GPU in said)


@needs("onnxruntime_qnn")
def test_the_simulator_is_called_one_and_is_registered_once() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from edgephi.devices.providers import register
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(register, ["qnn"] * 8))
assert all(one == found[0] for one in found)
import platform
assert platform.machine() not in ("x86_64", "AMD64") or [d.kind for d in found[0]] == ["npu-simulator"], found
print(found[0][0].provider, found[0][0].raw.ep_name)
"""
    assert in_a_process_of_its_own(code) == "QNNExecutionProvider QNNExecutionProvider"


@needs("onnxruntime_qnn")
def test_another_registration_of_the_same_library_is_used() -> None:
    code = """
import onnxruntime, onnxruntime_qnn
onnxruntime.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
from edgephi.devices.providers import register
print(len(register("qnn")))
"""
    assert in_a_process_of_its_own(code) == "1"


def test_detecting_registers_nothing_by_itself() -> None:
    code = """
import onnxruntime
before = {device.ep_name for device in onnxruntime.get_ep_devices()}
from edgephi.devices.detect import detect
machine = detect()
print({device.provider for device in machine.devices} == before)
"""
    assert in_a_process_of_its_own(code) == "True"


def test_no_line_of_edgephi_leaves_the_choice_to_a_policy_or_a_constant() -> None:
    """After QNN is registered, policies fail; og's is_*_available is always True."""
    banned = ("set_provider_selection_policy(", "is_qnn_available(", "is_webgpu_available(", "is_openvino_available(")
    for folder in ("edgephi", "export", "quantize", "devices", "runtime", "benchmarks"):
        for file in (PROJECT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not [word for word in banned if word in text], file


@pytest.mark.parametrize(
    ("provider", "listed", "kind"),
    [
        ("QNNExecutionProvider", "npu", "npu"),
        ("QNNExecutionProvider", "cpu", "npu-simulator"),
        ("QNNExecutionProvider", "gpu", "gpu"),
        ("WebGpuExecutionProvider", "gpu", "gpu"),
        ("WebGpuExecutionProvider", "cpu", "gpu-software"),
        ("OpenVINOExecutionProvider", "cpu", "cpu"),
        ("DmlExecutionProvider", "gpu", "gpu"),
        ("CPUExecutionProvider", "cpu", "cpu"),
    ],
)
def test_an_accelerator_on_the_cpu_is_a_simulator(provider: str, listed: str, kind: str) -> None:
    hardware = SimpleNamespace(
        type=SimpleNamespace(name=listed.upper()), vendor="maker", vendor_id=1, device_id=2, metadata={"Slot": "3"}
    )
    device = SimpleNamespace(ep_name=provider, device=hardware, ep_metadata={"version": "1"})
    info = providers.describe(device)  # type: ignore[arg-type]
    assert info.kind == kind
    assert info.is_hardware == (kind in ("cpu", "gpu", "npu"))
    assert info.raw is device
    assert info.metadata == {"version": "1", "Slot": "3"}
