"""What a machine is, read from its own files; machines made of files stand in for others."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgephi.benchmarks.report import circumstances
from edgephi.devices import cpu_features as cpu_features_module
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


def cores(*numbers: tuple[str, str]) -> str:
    """/proc/cpuinfo of an Arm processor: implementer and part of every core."""
    return "\n".join(
        f"processor\t: {index}\nFeatures\t: fp asimd\nCPU implementer\t: {implementer}\nCPU part\t: {part}\n"
        for index, (implementer, part) in enumerate(numbers)
    )


@linux
@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (cores(*[("0x51", "0x001")] * 12), "Qualcomm Oryon"),
        (cores(*[("0x41", "0xd4b")] * 4, *[("0x41", "0xd4c")] * 4), "Arm Cortex-A78C + Cortex-X1C"),
        (cores(("0x61", "0x022"), ("0x61", "0x023")), "Apple M1"),
        (cores(("0x6d", "0xd49")), "Microsoft Azure Cobalt 100"),
        (cores(("0x41", "0xd4f")), "Arm Neoverse V2"),
        (cores(("0x51", "0x777")), "Qualcomm core 0x777"),
        (cores(("0x77", "0x001")), "Arm processor of implementer 0x77 core 0x001"),
        (cores(("0x41", "0xd05"), ("0x51", "0x804")), "Arm Cortex-A55 + Qualcomm Kryo 4xx Gold"),
        ("model name\t: A board's own name\n" + cores(("0x41", "0xd08")), "A board's own name"),
        (cores(("zero", "0xd08")) + "Hardware\t: A board\n", "A board"),
        ("CPU part\t: 0x001\n", platform.machine()),
    ],
    ids=lambda value: value if len(value) < 50 else "",
)
def test_an_arm_processor_is_named_by_its_cores(tmp_path: Path, cpuinfo: str, name: str) -> None:
    """References: Linux, arch/arm64/include/asm/cputype.h."""
    assert cpu_name(machine(tmp_path, cpuinfo)) == name


@linux
def test_reports_of_measurements_name_it_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features_module, "_read_cpuinfo", lambda root: cores(("0x51", "0x001")))
    assert circumstances()["cpu"] == "Qualcomm Oryon"


def test_elsewhere_the_system_names_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cpu_features_module, "sysctl", lambda key: asked.append(key) or "Apple M3 Pro")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cpu_name() == "Apple M3 Pro"
    assert asked == ["machdep.cpu.brand_string"]

    class Key:
        def __enter__(self) -> str:
            return "opened"

        def __exit__(self, *raised: object) -> None:
            pass

    registry = SimpleNamespace(
        HKEY_LOCAL_MACHINE=0,
        OpenKey=lambda root, key: Key(),
        QueryValueEx=lambda key, name: ({"ProcessorNameString": "Snapdragon(R) X Elite - X1E80100 "}[name], 1),
    )
    monkeypatch.setitem(sys.modules, "winreg", registry)
    monkeypatch.setattr(sys, "platform", "win32")
    assert cpu_name() == "Snapdragon(R) X Elite - X1E80100"


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
