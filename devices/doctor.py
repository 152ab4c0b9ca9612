"""What is wrong with this installation: wheels that clash, providers without a device, drivers too old."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

from edgephi.devices.providers import all_providers
from edgephi.errors import DeviceError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from edgephi.devices.detect import Machine

Severity = Literal["error", "warning", "note"]
MODULES = ("onnxruntime", "onnxruntime_genai")
"""Module folders that several wheels install, each replacing the others' files."""


@dataclass(frozen=True)
class Finding:
    """Something a person may want to change."""

    severity: Severity
    what: str
    where: str | None
    remedy: str


def relevant_wheels() -> dict[str, str]:
    """Installed wheels that matter to running a model, with their versions."""
    wanted = {"edgephi", "onnx", "onnx-ir", "numpy", "tokenizers", "windowsml"}
    found: dict[str, str] = {}
    for wheel in metadata.distributions():
        name = (wheel.name or "").lower().replace("_", "-")
        if name in wanted or name.startswith("onnxruntime"):
            found.setdefault(name, wheel.version)  # the first on sys.path is the one imported
    return dict(sorted(found.items()))


def check_pins(requirements: Iterable[str], versions: Mapping[str, str]) -> list[Finding]:
    """Hold installed versions against requirements.

    Args:
        requirements: PEP 508 lines, as in edgephi's own metadata.
        versions: installed wheels.

    Returns:
        An error for each one missing or outside the range; a warning for an extra's wheel of another version, unless it
        is not installed, and for a core wheel of a version that an extra whose own wheel is installed does not take.
    """
    from packaging.requirements import Requirement

    findings = []
    lines = [Requirement(line) for line in requirements]
    core = {wanted.name for wanted in lines if not _of_extra(wanted)}
    used = {
        str(wanted.marker)
        for wanted in lines
        if _of_extra(wanted) and wanted.name not in core and wanted.name.lower().replace("_", "-") in versions
    }
    for wanted in lines:
        version = versions.get(wanted.name.lower().replace("_", "-"))
        extra = _of_extra(wanted)
        if extra and wanted.name in core and str(wanted.marker) not in used:
            continue
        if wanted.marker is not None and not extra and not wanted.marker.evaluate():
            continue
        command = f'`pip install "{wanted.name}{wanted.specifier}"`'
        if version is None:
            if not extra:
                findings.append(Finding("error", f"{wanted.name} is not installed", None, f"Install it with {command}"))
        elif not wanted.specifier.contains(version, prereleases=True):
            what = f"{wanted.name} {version} is installed, edgephi is made for {wanted.specifier}"
            findings.append(Finding("warning" if extra else "error", what, None, f"Run {command}"))
    return findings


def _of_extra(wanted: Requirement) -> bool:
    return wanted.marker is not None and "extra" in str(wanted.marker)


def check_owners(owners: Mapping[str, Iterable[str]]) -> list[Finding]:
    """Wheels that install the same module folder overwrite one another's files, and pip does not know.

    Args:
        owners: module folder → wheels that install it (`importlib.metadata.packages_distributions`).
    """
    findings = []
    for module in MODULES:
        wheels = sorted({name.lower().replace("_", "-") for name in owners.get(module, ())})
        if len(wheels) > 1:
            names = " ".join(wheels)
            findings.append(
                Finding(
                    "error",
                    f"{' and '.join(wheels)} install the same folder; the last one to come overwrote the others",
                    module,
                    f"Run `pip uninstall -y {names}`, then install one of them alone; DirectML and Windows ML "
                    "belong into an environment of their own",
                )
            )
    return findings


def check_imported(imported: Mapping[str, str], owners: Mapping[str, Iterable[str]]) -> list[Finding]:
    """A module that is not of the version its wheel records was overwritten by a wheel that is gone.

    Args:
        imported: module → its `__version__`.
        owners: as in `check_owners`.
    """
    findings = []
    for module, version in imported.items():
        wheels = {name: metadata.version(name) for name in set(owners.get(module, ()))}
        # Windows ML's wheel adds the date of its build
        if wheels and not any(
            recorded == version or recorded.startswith(version + ".") for recorded in wheels.values()
        ):
            said = ", ".join(f"{name} {recorded}" for name, recorded in sorted(wheels.items()))
            findings.append(
                Finding(
                    "error",
                    f"the module imported is {version}, but {said} is what pip installed",
                    module,
                    f"Run `pip install --force-reinstall --no-deps {' '.join(sorted(wheels))}`",
                )
            )
    return findings


def check_providers(machine: Machine) -> list[Finding]:
    """Providers that give no device, and devices that are not hardware."""
    severity: dict[str, Severity] = {"wheel": "note", "device": "warning"}
    findings = [
        Finding(severity.get(one.step, "error"), one.reason, f"step: {one.step}", one.remedy) for one in machine.missing
    ]
    for device in machine.devices:
        if not device.is_hardware:
            stand_in = "an NPU simulator" if device.kind == "npu-simulator" else "a software driver"
            what = f"{device.provider} has no hardware here, but {stand_in}"
            findings.append(Finding("note", what, None, "Name a profile to use it; nothing chooses it by itself"))
    return findings


def check_drivers() -> list[Finding]:
    """Drivers of providers that are installed and cannot work."""
    findings = []
    for known in all_providers():
        try:
            if known.check_driver is not None:
                known.check_driver()
        except DeviceError as error:
            findings.append(Finding("warning", error.what, error.where, error.remedy))
    return findings


def imported_versions() -> dict[str, str]:
    """Versions the modules themselves state; called in a child, because importing a broken one may crash."""
    from importlib import import_module

    return {module: str(import_module(module).__version__) for module in MODULES}


def examine() -> tuple[dict[str, str], list[Finding]]:
    """Everything above on this installation.

    Returns:
        Relevant wheels with their versions, and the findings, errors first.
    """
    from edgephi.child import call
    from edgephi.devices.detect import survey

    owners = metadata.packages_distributions()
    all_versions = {wheel.name.lower().replace("_", "-"): wheel.version for wheel in metadata.distributions()}
    provider_wheels = {wheel for known in all_providers() for wheel in known.wheels}
    requirements = [
        line
        for line in metadata.requires("edgephi") or ()
        if "extra ==" not in line or re.split(r"[^\w.-]", line, maxsplit=1)[0] in provider_wheels
    ]
    findings = check_pins(requirements, all_versions) + check_owners(owners)
    try:
        imported = call("edgephi.devices.doctor:imported_versions", {}, timeout_s=120, where="onnxruntime")
        assert isinstance(imported, dict)
        findings += check_imported(imported, owners)
        findings += check_providers(survey(known.short for known in all_providers()))
    except DeviceError as error:
        findings.append(Finding("error", error.what, error.where, error.remedy))
    findings += check_drivers()
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    return relevant_wheels(), sorted(findings, key=lambda finding: order[finding.severity])
