"""`edgephi devices` and `edgephi doctor` as a person or a program meets them."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_command import edgephi, refused

PROJECT = Path(__file__).resolve().parents[2]
SOFTWARE_GPU = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"

webgpu = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_ep_webgpu") is None or sys.platform != "linux",
    reason="needs onnxruntime-ep-webgpu on Linux",
)


def test_devices_as_json_follows_its_documented_schema() -> None:
    shown = json.loads(edgephi("devices", "--json").stdout)
    assert set(shown) == {
        *("os", "arch", "cpu", "memory_bytes", "available_bytes", "power"),
        *("devices", "missing", "profile", "profiles"),
    }
    assert shown["os"] == platform.system().lower()
    assert {device["provider"] for device in shown["devices"]} >= {"CPUExecutionProvider"}
    assert set(shown["devices"][0]) == {"provider", "kind", "vendor", "vendor_id", "device_id", "metadata"}
    for absent in shown["missing"]:
        assert set(absent) == {"provider", "step", "reason", "remedy"}
    best = shown["profiles"][0]
    assert set(best) == {"name", "summary", "evidence", "matches", "reasons"}
    assert best["name"] == shown["profile"] or shown["profile"] is None


def test_devices_says_why_a_profile_does_not_match() -> None:
    short = edgephi("devices").stdout
    assert "does not match" not in short
    every = edgephi("devices", "--all").stdout
    assert every.count("does not match") >= 8
    assert "because:" in every


def test_ones_own_profile_is_held_against_the_machine(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text((PROJECT / "devices/profiles/cpu-arm-neon.toml").read_text().replace("cpu-arm-neon", "mine"))
    shown = json.loads(edgephi("devices", "--profile", mine, "--json").stdout)
    assert [one["name"] for one in shown["profiles"]] == ["mine"]
    mine.write_text(mine.read_text().replace("spinning", "spining"))
    refused(edgephi("devices", "--profile", mine), "unknown key spining", "mine.toml")


@webgpu
def test_a_software_gpu_is_listed_only_when_asked_for_and_chosen_by_no_profile() -> None:
    from edgephi.devices.providers.vulkan import check_software_vulkan, software_vulkan
    from edgephi.errors import DeviceError

    without = json.loads(edgephi("devices", "--json").stdout)
    if any(device["kind"] == "gpu" for device in without["devices"]):
        pytest.skip("this machine has a GPU")
    (absent,) = [one for one in without["missing"] if one["provider"] == "webgpu"]
    assert absent["step"] == "device"
    assert SOFTWARE_GPU in absent["remedy"]

    asked = json.loads(edgephi("devices", "--json", **{SOFTWARE_GPU: "1"}).stdout)
    try:
        check_software_vulkan(software_vulkan())
    except DeviceError as error:
        (absent,) = [one for one in asked["missing"] if one["provider"] == "webgpu"]
        assert (absent["step"], absent["remedy"]) == ("driver", error.remedy)
    else:
        assert "gpu-software" in {device["kind"] for device in asked["devices"]}
    assert asked["profile"] == without["profile"]


def test_doctor_as_json_follows_its_documented_schema() -> None:
    done = edgephi("doctor", "--json")
    shown = json.loads(done.stdout)
    assert set(shown) == {"wheels", "findings", "errors"}
    for finding in shown["findings"]:
        assert set(finding) == {"severity", "what", "where", "remedy"}
    assert shown["errors"] == sum(finding["severity"] == "error" for finding in shown["findings"])
    assert done.returncode == (1 if shown["errors"] else 0), done.stderr


def test_doctor_repairs_a_folder_in_a_copy(tmp_path: Path) -> None:
    from tests.unit.test_foreign import config, graph, write

    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    graph(theirs / "model.onnx")
    (theirs / "tokenizer.json").write_text("{}")
    write(theirs, config(future=1))

    found = edgephi("doctor", theirs)
    assert found.returncode == 1
    assert "does not know model:decoder:future" in found.stdout.replace("\n", " ")
    refused(edgephi("doctor", theirs, "--fix"), "--output", status=2)

    fixed = edgephi("doctor", theirs, "--fix", "--output", mine, "--json")
    assert fixed.returncode == 0, fixed.stderr
    assert json.loads(fixed.stdout) == {
        "graphs": ["model.onnx"],
        "removed": ["model:decoder:future"],
        "findings": [],
        "errors": 0,
        "placement": None,
    }
    assert edgephi("doctor", mine).returncode == 0
    refused(edgephi("doctor", tmp_path / "nowhere"), "there is no such folder")
