"""What a fleet run has done so far, written after every step of it, so that it can end at any moment and go on."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from edgephi.devices.ai_hub.hosted import HostedBundle
from edgephi.devices.ai_hub.report import JobRecord
from edgephi.errors import BundleError
from edgephi.files import read_file, replace_file, unwritable
from edgephi.records import Sha256, Strict, first_problem

STATE = "state.json"
STATE_LIMIT = 64 * 2**20

Kind = Literal["compile", "link", "profile", "inference"]
Status = Literal["planned", "submitting", "submitted", "finished"]


class Step(Strict):
    """One job of a fleet run."""

    key: str = Field(pattern=r"^[0-9a-f]{16}$", description="of everything that decides its result")
    kind: Kind
    device: str
    chipset: str | None
    bundle: str
    graph: str = Field(description="name of the graph; of a link job all names")
    graph_sha256: Sha256
    needs: tuple[str, ...] = Field(description="keys of the steps that have to be done first")
    options: str
    inputs: str | None = Field(description="the .npz an inference computes")
    inputs_sha256: Sha256 | None
    attempt: int = Field(default=1, ge=1)
    status: Status = Field(
        default="planned", description="submitting: sent, and it is not known here whether the hub took it"
    )
    job_id: str | None = None
    model_id: str | None = Field(default=None, description="what a compile or link job made")
    record: JobRecord | None = Field(default=None, description="once it is finished")

    @property
    def done(self) -> bool:
        """Finished, and well."""
        return self.record is not None and self.record.status == "done"


class FleetState(Strict):
    """The content of state.json."""

    format: Literal[1] = 1
    run: str = Field(pattern=r"^[0-9a-f]{8}$", description="part of every job's name, to find a job again")
    server: str
    bundles: dict[str, HostedBundle] = Field(default_factory=dict, description="by the name of their folder")
    uploads: dict[str, str] = Field(default_factory=dict, description="SHA-256 of a graph to the hub's id of the model")
    steps: dict[str, Step] = Field(default_factory=dict, description="by key, in the order they were planned")

    @model_validator(mode="after")
    def _needs_come_first(self) -> FleetState:
        seen: set[str] = set()
        for key, step in self.steps.items():
            if key != step.key or not seen.issuperset(step.needs):
                raise ValueError(f"step {key} needs one that does not come before it")
            seen.add(key)
        return self

    def job_name(self, step: Step) -> str:
        """What the job is called on the hub: for people, and unique, so that a lost answer can be found again."""
        return f"{step.bundle} {step.graph} {step.kind}"[:150] + f" [edgephi {self.run}-{step.key}-{step.attempt}]"

    def with_step(self, step: Step) -> FleetState:
        """The state with one step replaced or added."""
        return self.model_copy(update={"steps": {**self.steps, step.key: step}})

    def with_upload(self, graph_sha256: str, model: str) -> FleetState:
        """The state with one more upload."""
        return self.model_copy(update={"uploads": {**self.uploads, graph_sha256: model}})


def with_bundles(state: FleetState, bundles: Mapping[str, HostedBundle]) -> FleetState:
    """The state with what these bundles are now; those of earlier plans stay."""
    return state.model_copy(update={"bundles": {**state.bundles, **bundles}})


def planned(state: FleetState, steps: tuple[Step, ...], *, retry_failed: bool) -> FleetState:
    """The state with the steps of a plan: those it knows stay as they are, those it does not are added.

    Args:
        retry_failed: plan a step again that failed, or that was skipped because one before it failed.
    """
    known = dict(state.steps)
    for step in steps:
        old = known.get(step.key)
        if old is None:
            known[step.key] = step
        elif retry_failed and old.status == "finished" and not old.done:
            known[step.key] = step.model_copy(update={"attempt": old.attempt + 1})
    return state.model_copy(update={"steps": known})


def new_state(server: str) -> FleetState:
    """A run that has done nothing."""
    return FleetState(run=secrets.token_hex(4), server=server)


def read_state(path: Path) -> FleetState:
    """Read a state file.

    Raises:
        BundleError: it is missing, malformed, or of another format.
    """
    remedy = "Name the state.json of a fleet run"
    try:
        if path.stat().st_size > STATE_LIMIT:
            raise BundleError("the state file is implausibly large", where=path, remedy=remedy)
        return FleetState.model_validate_json(read_file(path, limit=STATE_LIMIT, error=BundleError, remedy=remedy))
    except OSError as error:
        raise BundleError(
            f"the state of the run cannot be read: {error.strerror or error}", where=path, remedy=remedy
        ) from error
    except ValidationError as error:
        raise BundleError(
            f"the state of the run cannot be used: {first_problem(error)}", where=path, remedy=remedy
        ) from error


def write_state(path: Path, state: FleetState) -> None:
    """Replace a state file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_beside(path, json.dumps(state.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")


def write_beside(path: Path, text: str) -> None:
    """Write a file of UTF-8 text beside its place and rename it.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(error, path.parent, "Choose another --output") from error
    replace_file(path, text.encode(), "Choose another --output")
