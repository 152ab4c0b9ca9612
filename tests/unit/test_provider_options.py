"""Options providers would swallow without a word are refused here, with what is known instead."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from edgephi.bundle import GraphEntry
from edgephi.devices.profile import load_profile
from edgephi.devices.providers import PROVIDERS, check_options, provider, runtime_wheels
from edgephi.errors import DeviceError

CHIP = {"soc_model": "60", "htp_arch": "73"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cpu", {}),
        ("qnn", CHIP),
        ("QNNExecutionProvider", CHIP | {"backend_type": "htp", "offload_graph_io_quantization": "0"}),
        ("qnn", {"backend_type": "gpu"}),
        ("webgpu", {"validationMode": "basic", "maxNumPendingDispatches": "4096"}),
        ("openvino", {"enable_qdq_optimizer": "true", "cache_dir": "blobs"}),
        ("directml", {"device_filter": "npu"}),
    ],
)
def test_known_options_pass(name: str, options: dict[str, str]) -> None:
    check_options(name, options)


@pytest.mark.parametrize(
    ("name", "options", "said", "advice"),
    [
        ("qnn", CHIP | {"htp_performanc_mode": "burst"}, "htp_performanc_mode", "Write htp_performance_mode"),
        ("qnn", {"soc_model": "60", "htp_arch": "999"}, "htp_arch='999'", "one of 68, 69, 73"),
        ("qnn", {"soc_model": "60", "htp_arch": "75"}, "architecture 73", "Set htp_arch to 73"),
        ("qnn", {"soc_model": "sixty", "htp_arch": "73"}, "soc_model='sixty'", "a whole number from 1 to 999"),
        ("qnn", CHIP | {"vtcm_mb": "-1"}, "vtcm_mb='-1'", "a whole number"),
        ("qnn", CHIP | {"vtcm_mb": "٣"}, "vtcm_mb", "a whole number"),
        ("qnn", CHIP | {"op_affinity": "absent.json"}, "absent.json", "a file that exists"),
        ("qnn", CHIP | {"backend_path": "libQnnHtp.so"}, "backend_path", "Write backend_type"),
        ("qnn", CHIP | {"op_packages": "Op:evil.so:f"}, "op_packages", "Leave it out"),
        ("webgpu", {"powerPreference": "high_performance"}, "powerPreference", "high-performance"),
        ("webgpu", {"webgpuDevice": "12345"}, "webgpuDevice", "Leave it out"),
        ("webgpu", {"maxNumPendingDispatches": "5000"}, "5000", "from 1 to 4096"),
        ("openvino", {"enable_qdq_optimizer": "1"}, "enable_qdq_optimizer='1'", "one of true, false"),
        ("openvino", {"cache_dir": ""}, "cache_dir", "a path"),
        ("cpu", {"use_arena": "1"}, "use_arena", "known are none"),
    ],
)
def test_what_a_provider_would_swallow_is_refused(name: str, options: dict[str, str], said: str, advice: str) -> None:
    with pytest.raises(DeviceError, match=said) as refused:
        check_options(name, options, where="mine.toml")
    assert refused.value.step == "options"
    assert refused.value.where == "mine.toml"
    assert advice in refused.value.remedy, refused.value.remedy


@pytest.mark.parametrize("left_out", ["soc_model", "htp_arch"])
def test_the_npu_is_always_told_which_chip_it_is(left_out: str) -> None:
    options = {name: value for name, value in CHIP.items() if name != left_out}
    with pytest.raises(DeviceError, match=f"{left_out} is missing"):
        check_options("qnn", options)


def test_an_unknown_provider_is_named_with_the_known_ones() -> None:
    with pytest.raises(DeviceError, match=r"'cuda'.*cpu, qnn, webgpu, openvino, directml"):
        provider("cuda")


def test_each_provider_is_found_by_both_names() -> None:
    for known in PROVIDERS:
        assert provider(known.short) is provider(known.name) is known


def test_directml_is_found_by_the_word_of_before() -> None:
    assert provider("dml") is provider("directml")


def test_every_word_names_one_provider_and_can_stand_in_a_manifest() -> None:
    words = [word for known in PROVIDERS for word in (known.short, known.name, *known.aliases)]
    assert len(set(words)) == len(words)
    for known in PROVIDERS:
        assert GraphEntry(device=known.short, file="model.onnx").device == known.short
    for wrong in ("", "CPU", "-cpu", "cpu\n", "a" * 33, "../cpu"):
        with pytest.raises(ValidationError):
            GraphEntry(device=wrong, file="model.onnx")


def test_onnxruntime_genai_and_the_cache_of_packed_weights_get_the_names_they_know() -> None:
    names = {known.short: known.genai_name for known in PROVIDERS}
    assert names == {"cpu": None, "qnn": "qnn", "webgpu": "webgpu", "openvino": "openvino", "directml": "dml"}
    assert runtime_wheels() == ("onnxruntime", "onnxruntime-directml", "onnxruntime-windowsml")


def test_importing_the_providers_loads_no_onnxruntime() -> None:
    program = "import sys, edgephi.devices.providers; print('onnxruntime' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_each_profile_a_provider_names_begins_with_it() -> None:
    for known in PROVIDERS:
        if known.profile is not None:
            assert load_profile(known.profile).prefill[0] == known.short
