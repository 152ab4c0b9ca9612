"""What a machine is, read from its own files; machines made of files stand in for others."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgephi.devices import detect
from edgephi.devices.cpu_features import cpu_features, cpu_name
from edgephi.installed import install_extra

X86 = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu sse4_2 avx avx2 avx512f avx512_vnni rdseed\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm crc32\nCPU part\t: 0x001\n"

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def machine(root: Path, cpuinfo: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(cpuinfo)
    return root


@linux
@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        (X86, {"sse4_2", "avx", "avx2", "avx512f", "avx512_vnni"}),
        (ARM, {"asimd", "asimddp", "i8mm"}),
        ("rubbish\n", set()),
    ],
    ids=["x86", "arm", "rubbish"],
)
def test_instruction_sets_come_from_the_kernel(tmp_path: Path, cpuinfo: str, features: set[str]) -> None:
    assert cpu_features(machine(tmp_path, cpuinfo)) == features


@linux
def test_the_name_is_the_makers(tmp_path: Path) -> None:
    assert cpu_name(machine(tmp_path, X86)) == "Some CPU @ 3 GHz"


@pytest.mark.parametrize(
    ("said", "name"), [("AMD64", "x86_64"), ("x86_64", "x86_64"), ("aarch64", "arm64"), ("ARM64", "arm64")]
)
def test_an_architecture_has_one_name(said: str, name: str) -> None:
    assert detect.architecture(said) == name


@pytest.mark.parametrize(
    ("battery", "power"),
    [
        (None, "mains"),
        (SimpleNamespace(power_plugged=True), "mains"),
        (SimpleNamespace(power_plugged=False), "battery"),
        (SimpleNamespace(power_plugged=None), "unknown"),
    ],
    ids=["no battery", "plugged", "unplugged", "not told"],
)
def test_the_power_source(monkeypatch: pytest.MonkeyPatch, battery: object, power: str) -> None:
    monkeypatch.setattr("psutil.sensors_battery", lambda: battery, raising=False)
    assert detect.detect().power == power


def test_this_machine_in_plain_data() -> None:
    import json
    import os

    import psutil

    seen = detect.detect()
    plain = json.loads(json.dumps(seen.as_json()))
    assert plain["memory_bytes"] == psutil.virtual_memory().total
    assert 1 <= plain["cpu"]["cores"] <= (os.cpu_count() or 1)
    assert plain["devices"][0]["provider"] == "CPUExecutionProvider"
    assert not any("raw" in device for device in plain["devices"])


def test_what_could_not_be_looked_at_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgephi.devices.providers.installed_wheel", lambda known: None)
    (missing,) = detect.detect(("openvino",)).missing
    assert (missing.provider, missing.step) == ("openvino", "wheel")
    assert install_extra("openvino") in missing.remedy
