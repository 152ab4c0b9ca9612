"""The doctor's findings, each from an installation made up for it."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from edgephi.devices import doctor
from edgephi.devices.detect import Missing, detect
from edgephi.devices.providers import webgpu
from edgephi.devices.providers.vulkan import SoftwareVulkan
from edgephi.errors import Step

CORE = {"onnxruntime": "1.31.1", "onnxruntime-genai": "0.18.0"}
PINS = [
    "onnxruntime>=1.31,<1.33",
    "onnxruntime_genai>=0.18,<0.19",
    'onnxruntime-qnn==2.7.0; extra == "qnn"',
    'onnxruntime<1.32; extra == "qnn"',
    'colorama; sys_platform == "nowhere"',
]


def found(findings: list[doctor.Finding]) -> list[tuple[str, str]]:
    return [(finding.severity, finding.what) for finding in findings]


def test_the_versions_edgephi_asks_for_are_well() -> None:
    assert doctor.check_pins(PINS, CORE | {"onnxruntime-qnn": "2.7.0"}) == []


@pytest.mark.parametrize("version", ["1.31.0", "1.32.0"])
def test_both_supported_versions_of_onnxruntime_are_well(version: str) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (line,) = [line for line in project["dependencies"] if line.startswith("onnxruntime>")]
    assert doctor.check_pins([line], {"onnxruntime": version}) == []


@pytest.mark.parametrize(
    ("changed", "severity", "what"),
    [
        ({"onnxruntime": "1.30.0"}, "error", "onnxruntime 1.30.0 is installed, edgephi is made for <1.33,>=1.31"),
        ({"onnxruntime-genai": "0.19.1"}, "error", "onnxruntime_genai 0.19.1 is installed"),
        ({"onnxruntime-qnn": "2.6.0"}, "warning", "onnxruntime-qnn 2.6.0 is installed, edgephi is made for ==2.7.0"),
        (
            {"onnxruntime": "1.32.0", "onnxruntime-qnn": "2.7.0"},
            "warning",
            "onnxruntime 1.32.0 is installed, edgephi is made for <1.32",
        ),
    ],
)
def test_a_version_that_clashes_with_a_pin(changed: dict[str, str], severity: str, what: str) -> None:
    (finding,) = doctor.check_pins(PINS, CORE | changed)
    assert finding.severity == severity
    assert finding.what.startswith(what)
    assert "pip install" in finding.remedy


def test_a_version_that_only_an_extra_refuses_is_well_without_the_extra() -> None:
    assert doctor.check_pins(PINS, CORE | {"onnxruntime": "1.32.0"}) == []


def test_a_missing_core_wheel_is_an_error_and_a_missing_extra_is_none() -> None:
    assert found(doctor.check_pins(PINS, {"onnxruntime": "1.31.1"})) == [
        ("error", "onnxruntime_genai is not installed")
    ]


@pytest.mark.parametrize(
    "wheels",
    [
        ("onnxruntime", "onnxruntime-directml"),
        ("onnxruntime", "onnxruntime-gpu"),
        ("onnxruntime", "onnxruntime_windowsml"),
        ("onnxruntime", "onnxruntime-openvino"),
    ],
)
def test_wheels_that_install_the_same_folder_are_named(wheels: tuple[str, str]) -> None:
    (finding,) = doctor.check_owners({"onnxruntime": wheels, "onnxruntime_genai": ["onnxruntime-genai"]})
    assert finding.severity == "error"
    for name in wheels:
        assert name.replace("_", "-") in finding.what
        assert name.replace("_", "-") in finding.remedy


def test_one_wheel_named_twice_is_one() -> None:
    assert doctor.check_owners({"onnxruntime": ["onnxruntime", "onnxruntime"]}) == []


def test_each_requirements_file_conflicts_with_the_core() -> None:
    """What DirectML's and Windows ML's files pin is what the doctor calls a conflict beside the plain wheels."""
    for file in (Path(doctor.__file__).parent / "requirements").glob("*.txt"):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
        runtime, generator = (line.split("==")[0] for line in lines)
        owners = {"onnxruntime": ["onnxruntime", runtime], "onnxruntime_genai": ["onnxruntime-genai", generator]}
        assert len(doctor.check_owners(owners)) == 2


@pytest.mark.parametrize(
    ("recorded", "imported", "well"),
    [
        ("1.31.1", "1.31.1", True),
        ("1.30.0.202609102321", "1.30.0", True),
        ("1.31.1", "1.24.4", False),
        ("1.31.10", "1.31.1", False),
    ],
)
def test_a_module_left_over_from_another_wheel_is_seen_by_its_version(
    monkeypatch: pytest.MonkeyPatch, recorded: str, imported: str, well: bool
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: recorded)
    findings = doctor.check_imported({"onnxruntime": imported}, {"onnxruntime": ["onnxruntime"]})
    assert [finding.severity for finding in findings] == ([] if well else ["error"])
    assert well or "--force-reinstall" in findings[0].remedy


@pytest.mark.parametrize(
    ("step", "severity"),
    [("wheel", "note"), ("device", "warning"), ("library", "error"), ("driver", "error"), ("process", "error")],
)
def test_how_bad_a_provider_without_a_device_is(step: Step, severity: str) -> None:
    from dataclasses import replace

    # a library that another test registered stays in this process, and its devices with it
    machine = replace(detect(), devices=(), missing=(Missing("qnn", step, "reason", "Do this"),))
    (finding,) = doctor.check_providers(machine)
    assert (finding.severity, finding.remedy) == (severity, "Do this")


@pytest.mark.skipif("sys.platform != 'linux'", reason="lavapipe is Linux's")
def test_a_software_driver_too_old_is_named_before_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_driver(there: SoftwareVulkan) -> list[doctor.Finding]:
        monkeypatch.setattr(webgpu, "software_vulkan", lambda: there)
        return doctor.check_drivers()

    old = SoftwareVulkan(True, Path("libvulkan_lvp.so"), "22.3.6")
    assert found(with_driver(old)) == [("warning", "Mesa 22.3.6 is too old for WebGPU")]
    assert with_driver(SoftwareVulkan(True, Path("libvulkan_lvp.so"), "25.0.7")) == []
    assert with_driver(SoftwareVulkan(False, None, None)) == []


def test_this_installation_has_the_wheels_it_runs_on() -> None:
    wheels, findings = doctor.examine()
    for name in ("onnxruntime", "onnxruntime-genai"):
        assert wheels[name] == metadata.version(name)
    order = [finding.severity for finding in findings]
    assert order == sorted(order, key=["error", "warning", "note"].index)
