"""The software Vulkan driver is found through the loader's manifests, and an old one is refused by its version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgephi.devices.providers.vulkan import SoftwareVulkan, check_software_vulkan, software_vulkan
from edgephi.errors import DeviceError


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)


def installed(root: Path, mesa: str, *, named: str = "libvulkan_lvp.so", manifest: str = "lvp_icd.json") -> Path:
    library = root / "usr/lib/x86_64-linux-gnu/libvulkan_lvp.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF\0" + mesa.encode() + b"\0")
    folder = root / "usr/share/vulkan/icd.d"
    folder.mkdir(parents=True)
    (folder / manifest).write_text(json.dumps({"ICD": {"library_path": named}}))
    return library


@pytest.mark.parametrize("named", ["libvulkan_lvp.so", "/usr/lib/x86_64-linux-gnu/libvulkan_lvp.so"])
def test_the_driver_and_its_version_are_found(tmp_path: Path, named: str) -> None:
    library = installed(tmp_path, "Mesa 22.3.6 (git-1)", named=named)
    found = software_vulkan(tmp_path)
    assert (found.library, found.mesa) == (library, "22.3.6")


def test_a_manifest_named_in_the_environment_comes_before_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, own = tmp_path / "system", tmp_path / "own"
    installed(system, "Mesa 22.3.6")
    library = installed(own, "Mesa 25.0.7", named="../../../lib/x86_64-linux-gnu/libvulkan_lvp.so")
    monkeypatch.setenv("VK_DRIVER_FILES", str(own / "usr/share/vulkan/icd.d/lvp_icd.json"))
    found = software_vulkan(system)
    assert found.mesa == "25.0.7"
    assert found.library is not None
    assert found.library.samefile(library)


@pytest.mark.parametrize("manifest", [b"rubbish", b"[]", b"{}", b'{"ICD": {"library_path": 1}}'])
def test_a_manifest_that_is_none_is_passed_over(tmp_path: Path, manifest: bytes) -> None:
    installed(tmp_path, "Mesa 25.0.7")
    (tmp_path / "usr/share/vulkan/icd.d/lvp_icd.json").write_bytes(manifest)
    assert software_vulkan(tmp_path).library is None


def test_a_hardware_driver_is_no_software_driver(tmp_path: Path) -> None:
    installed(tmp_path, "Mesa 25.0.7", manifest="radeon_icd.json")
    assert software_vulkan(tmp_path).library is None


DRIVER = Path("libvulkan_lvp.so")


@pytest.mark.parametrize(
    ("found", "said", "advice"),
    [
        (SoftwareVulkan(False, DRIVER, "25.0.7"), "loader", "libvulkan1"),
        (SoftwareVulkan(True, None, None), "no software Vulkan driver", "Mesa 25"),
        (SoftwareVulkan(True, DRIVER, "22.3.6"), "Mesa 22.3.6 is too old", "bookworm-backports"),
    ],
)
def test_what_cannot_work_is_refused_with_the_package_to_install(found: SoftwareVulkan, said: str, advice: str) -> None:
    with pytest.raises(DeviceError, match=said) as refused:
        check_software_vulkan(found)
    assert refused.value.step == "driver"
    assert advice in refused.value.remedy


@pytest.mark.parametrize("mesa", ["25.0.7", "26.1.0", None])
def test_a_new_or_unknown_version_passes(mesa: str | None) -> None:
    check_software_vulkan(SoftwareVulkan(True, DRIVER, mesa))
