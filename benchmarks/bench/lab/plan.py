"""A lab is data: a TOML file that names bundles, workloads, devices and settings. Every combination is a cell."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

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


class MachineDevice(StrictData):
    """A device of one of many machines, which workers of a Dask scheduler have as a resource."""

    name: str = Field(min_length=1, max_length=40, description="in tables")
    device: Word = Field(default="auto", description="as `--device` on that machine")
    resource: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,80}$", description="what its worker calls it")
    bundles: Word | None = Field(default=None, description="folder there that holds the bundles, by their own names")


def _kind(value: object) -> str:
    return "name" if isinstance(value, str) else "table"


Device = Annotated[Annotated[Word, Tag("name")] | Annotated[MachineDevice, Tag("table")], Discriminator(_kind)]


class Lab(StrictData):
    """The TOML file."""

    description: str = ""
    bundles: Words = Field(description="folders, relative to the file, or names of installed models")
    workloads: Words = Field(description="built-in names, or TOML files relative to the file")
    devices: tuple[Device, ...] = Field(default=("auto",), min_length=1)
    scheduler: Word | None = Field(default=None, description="address of a Dask scheduler")
    settings: tuple[Setting, ...] = Field(default=(Setting(),), min_length=1)
    repetitions: int | None = Field(default=None, ge=1, le=200, description="instead of the workloads'")
    cell_seconds: float | None = Field(default=None, gt=0, description="time budget of each cell")

    @model_validator(mode="after")
    def _names_differ(self) -> Lab:
        for what, names in (
            ("bundles", self.bundles),
            ("workloads", self.workloads),
            ("devices", tuple(one if isinstance(one, str) else one.name for one in self.devices)),
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
    machine: MachineDevice | None = None
    """Of many machines; None: the one that has the lab, or any whose worker has the device."""

    @property
    def device_name(self) -> str:
        """For people."""
        return self.machine.name if self.machine else self.device

    @property
    def resource(self) -> str:
        """What a worker that may measure it has; for `cpu`, `edgephi-cpu`."""
        return self.machine.resource if self.machine else f"edgephi-{Path(self.device).stem}"

    @property
    def title(self) -> str:
        """For people."""
        parts = [self.bundle.name, Path(self.workload).stem, self.device_name]
        return ", ".join([*parts, *([self.setting.name] if self.setting.name != "default" else [])])


def read_lab(path: Path, installed: Callable[[str], Path | None] = lambda name: None) -> tuple[Lab, list[Cell]]:
    """Read a lab's file, and everything that its cells name.

    Args:
        installed: the folder of an installed model; asked where there is no folder of the name beside the file.

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
    return lab, _cells(lab, path, installed)


def _cells(lab: Lab, path: Path, installed: Callable[[str], Path | None]) -> list[Cell]:
    if len(lab.bundles) * len(lab.workloads) * len(lab.devices) * len(lab.settings) > CELL_LIMIT:
        raise UsageError(f"the lab has more than {CELL_LIMIT:,} cells", where=path, remedy="Split it into several")
    known = built_in()
    workloads = [name if name in known else str(path.parent / name) for name in lab.workloads]
    asked = {name: read_workload(name).sha256 for name in workloads}
    bundles = [_folder(name, path, installed) for name in lab.bundles]
    hashes = {folder: bundle_facts(folder, read_manifest(folder)).sha256 for folder in bundles}
    versions = library_versions(*LIBRARIES)
    cells: dict[str, Cell] = {}
    for workload, folder, asked_device, setting in product(workloads, bundles, lab.devices, lab.settings):
        machine = None if isinstance(asked_device, str) else asked_device
        device = asked_device if isinstance(asked_device, str) else asked_device.device
        facts: list[object] = [
            hashes[folder],
            asked[workload],
            device,
            setting.threads,
            setting.spinning,
            lab.repetitions,
            versions,
        ]
        if machine is not None:
            facts.append(machine.name)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        words = (
            folder.resolve().name,
            Path(workload).stem,
            machine.name if machine else Path(device).stem,
            setting.name,
        )
        plain = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", word).strip("-.")[:30] for word in words)
        cell = Cell(f"{plain}-{key}", folder, workload, device, setting, lab.repetitions, machine)
        if cell.name in cells:
            raise UsageError(
                f"two cells are the same: {cell.title}, and {cells[cell.name].title}",
                where=path,
                remedy="Name each bundle and each workload once; a copy or another spelling is the same one",
            )
        cells[cell.name] = cell
    return list(cells.values())


def _folder(name: str, path: Path, installed: Callable[[str], Path | None]) -> Path:
    beside = path.parent / name
    return beside if beside.exists() else installed(name) or beside
