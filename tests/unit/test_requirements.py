"""Wheels beside the core are extras; wheels instead of the core are requirements files."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from edgephi.devices.providers import PROVIDERS, install_command
from edgephi.installed import install_extra

PROJECT = Path(__file__).resolve().parents[2]
FILES = sorted((PROJECT / "devices/requirements").glob("*.txt"))


def requirements(file: Path) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_requirements_file_pins_one_runtime_and_one_generator(file: Path) -> None:
    wanted = requirements(file)
    assert all(str(one.specifier).startswith("==") for one in wanted)
    assert [one.name.startswith("onnxruntime-genai") for one in wanted] == [False, True]
    assert wanted[0].name in next(known for known in PROVIDERS if known.short == "directml").wheels


def test_every_windows_architecture_has_one() -> None:
    assert {file.stem.rsplit("-", 1)[1] for file in FILES} == {"x64", "arm64"}


def test_each_extra_installs_the_wheel_of_its_provider() -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for known in PROVIDERS:
        if known.extra is not None:
            wheel, *bounds = [Requirement(line) for line in extras[known.extra]]
            assert {one.name for one in bounds} <= {"onnxruntime"}  # which versions of the core it works with
            assert wheel.name == known.wheels[0]
            assert install_command(known) == install_extra(known.extra)


def test_the_command_for_directml_names_a_file_that_exists() -> None:
    directml = next(known for known in PROVIDERS if known.short == "directml")
    assert Path(install_command(directml).split('"')[1]) in FILES
