"""A lab is data: a TOML file that names bundles, workloads, devices and settings. Every combination is a cell."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from edgephi.benchmarks.bench.assemble import LIBRARIES, bundle_facts
from edgephi.benchmarks.bench.results import StrictData
from edgephi.benchmarks.bench.workload import built_in, read_workload
from edgephi.benchmarks.report import library_versions
from edgephi.bundle import read_manifest
from edgephi.errors import UsageError
from edgephi.files import parse_toml, read_file
from edgephi.records import first_problem

FILE_LIMIT = 2**20
CELL_LIMIT = 10_000

Word = Annotated[str, Field(min_length=1, max_length=1000)]
Words = Annotated[tuple[Word, ...], Field(min_length=1)]


class Setting(StrictData):
    """How bundles are loaded; what is left out is decided as `edgephi bench` does."""

    name: str = Field(default="default", min_length=1, max_length=40)
    threads: int | None = Field(default=None, ge=1, le=1024, description="of the CPU")
    spinning: bool | None = None


class Lab(StrictData):
    """The TOML file."""

    description: str = ""
    bundles: Words = Field(description="folders, relative to the file")
    workloads: Words = Field(description="built-in names, or TOML files relative to the file")
    devices: Words = ("auto",)
    settings: tuple[Setting, ...] = Field(default=(Setting(),), min_length=1)
    repetitions: int | None = Field(default=None, ge=1, le=200, description="instead of the workloads'")
    cell_seconds: float | None = Field(default=None, gt=0, description="time budget of each cell")

    @model_validator(mode="after")
    def _names_differ(self) -> Lab:
        for what, names in (
            ("bundles", self.bundles),
            ("workloads", self.workloads),
            ("devices", self.devices),
            ("settings", tuple(one.name for one in self.settings)),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"{what} has a name twice")
        return self


@dataclass(frozen=True)
class Cell:
    """One combination."""

    name: str
    """Of its folder; other bundles, questions, settings or versions of libraries have another name."""
    bundle: Path
    workload: str
    device: str
    setting: Setting
    repetitions: int | None

    @property
    def title(self) -> str:
        """For people."""
        parts = [self.bundle.name, Path(self.workload).stem, self.device]
        return ", ".join([*parts, *([self.setting.name] if self.setting.name != "default" else [])])


def read_lab(path: Path) -> tuple[Lab, list[Cell]]:
    """Read a lab's file, and everything that its cells name.

    Raises:
        UsageError: the file cannot be used (the key is named), or a workload cannot.
        BundleError: a bundle cannot be read.
    """
    source = read_file(path, limit=FILE_LIMIT, error=UsageError, remedy="Name a TOML file that describes a lab")
    try:
        lab = Lab.model_validate_json(json.dumps(parse_toml(source.decode("utf-8"))))
    except ValidationError as error:
        raise UsageError(first_problem(error), where=path, remedy="Correct this key of the lab") from error
    except (ValueError, TypeError) as error:  # TypeError: a date, which no key takes
        raise UsageError(f"the lab is not TOML that can be used: {error}", where=path, remedy="Correct it") from error
    return lab, _cells(lab, path)


def _cells(lab: Lab, path: Path) -> list[Cell]:
    if len(lab.bundles) * len(lab.workloads) * len(lab.devices) * len(lab.settings) > CELL_LIMIT:
        raise UsageError(f"the lab has more than {CELL_LIMIT:,} cells", where=path, remedy="Split it into several")
    known = built_in()
    workloads = [name if name in known else str(path.parent / name) for name in lab.workloads]
    asked = {name: read_workload(name).sha256 for name in workloads}
    bundles = [path.parent / name for name in lab.bundles]
    hashes = {folder: bundle_facts(folder, read_manifest(folder)).sha256 for folder in bundles}
    versions = library_versions(*LIBRARIES)
    cells = []
    for workload, folder, device, setting in product(workloads, bundles, lab.devices, lab.settings):
        facts = [hashes[folder], asked[workload], device, setting.threads, setting.spinning, lab.repetitions, versions]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        words = (folder.resolve().name, Path(workload).stem, Path(device).stem, setting.name)
        plain = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", word).strip("-.")[:30] for word in words)
        cells.append(Cell(f"{plain}-{key}", folder, workload, device, setting, lab.repetitions))
    return cells
