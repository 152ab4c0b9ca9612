"""A fleet run as data: which graphs of which bundles, on which hosted devices, in which kinds of jobs.

    format = 1
    devices = ["Snapdragon X Elite CRD"]
    jobs = ["profile"]                  # of compile, link, profile, inference
    timeout_minutes = 240               # of waiting; 240 when left out

    [[bundle]]
    folder = "phi-4-mini-x-elite"       # relative to this file
    graphs = ["prefill_*"]              # names or shell patterns; every graph compiled for an NPU when left out
    inputs = { "prefill_0" = "a.npz" }  # what inference computes, for each graph

    [options]                           # the hub's own, for each kind of job; {graph} is the graph's name
    profile = "--max_profiler_iterations 50"

Where `compile` is among the jobs, the others run what it made; `link` makes one binary of everything compiled for a
device and the others run that.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from edgephi.devices.ai_hub.graphs import HubGraph, hub_graphs, read_inputs, require_sendable
from edgephi.devices.ai_hub.state import Kind, Step
from edgephi.errors import UsageError
from edgephi.files import parse_toml, read_argument
from edgephi.records import Strict, first_problem

MATRIX_LIMIT = 2**20


class BundleChoice(Strict):
    """A bundle of the matrix."""

    folder: str = Field(min_length=1)
    graphs: tuple[str, ...] = ()
    inputs: dict[str, str] = Field(default_factory=dict)


class Options(Strict):
    """Options of the hub for each kind of job, as it documents them."""

    compile: str = ""
    link: str = ""
    profile: str = ""
    inference: str = ""


class Matrix(Strict):
    """The content of a matrix file."""

    format: Literal[1]
    devices: tuple[str, ...] = Field(min_length=1)
    jobs: tuple[Kind, ...] = Field(default=("profile",), min_length=1)
    timeout_minutes: float = Field(default=240, gt=0, allow_inf_nan=False)
    bundle: tuple[BundleChoice, ...] = Field(min_length=1)
    options: Options = Options()

    @model_validator(mode="after")
    def _jobs_follow(self) -> Matrix:
        if "link" in self.jobs and "compile" not in self.jobs:
            raise ValueError("link needs compile: it joins what was compiled")
        for name, values in (("devices", self.devices), ("jobs", self.jobs)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names one twice")
        return self


def read_matrix(path: Path) -> Matrix:
    """Read a matrix file.

    Raises:
        UsageError: it is missing or malformed.
    """
    remedy = "Write one as `edgephi ai-hub run --help` describes"
    text = read_argument(path, "the matrix", error=UsageError, limit=MATRIX_LIMIT)
    try:
        written = parse_toml(text)
    except ValueError as error:
        raise UsageError(f"the matrix is no TOML: {error}", where=path, remedy=remedy) from error
    try:
        return Matrix.model_validate(_tuples(written), strict=True)
    except ValidationError as error:
        raise UsageError(f"the matrix cannot be used: {first_problem(error)}", where=path, remedy=remedy) from error


def _tuples(value: object) -> object:
    """TOML's arrays as tuples, which is what a frozen record holds."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def require_devices(wanted: Collection[str], offered: Mapping[str, object]) -> None:
    """Every device is offered under this very name.

    Raises:
        UsageError: one is not; it says which names come close.
    """
    by_lower = {name.lower(): name for name in offered}
    for name in wanted:
        if name in offered:
            continue
        near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
        raise UsageError(
            f"the hub has no device {name!r}",
            remedy=f"Did you mean {' or '.join(near)}" if near else "Choose one that `edgephi ai-hub devices` lists",
        )


def graphs_of(matrix: Matrix, root: Path) -> tuple[tuple[BundleChoice, tuple[HubGraph, ...]], ...]:
    """The graphs the matrix names, checked for what the hub takes; relative folders start at `root`.

    Raises:
        BundleError: a bundle is incomplete, or a graph cannot be sent.
        UsageError: a name matches nothing, inputs are missing or do not fit, or two bundles share a name.
    """
    chosen = tuple((choice, hub_graphs(root / choice.folder, choice.graphs)) for choice in matrix.bundle)
    names = [graphs[0].bundle for _, graphs in chosen]
    if len(set(names)) != len(names):
        raise UsageError("two bundles of the matrix have folders of one name", remedy="Rename one of the folders")
    for choice, graphs in chosen:
        for graph in graphs:
            require_sendable(graph)
            if "inference" in matrix.jobs:
                _require_inputs(choice, graph, root)
    return chosen


def _require_inputs(choice: BundleChoice, graph: HubGraph, root: Path) -> None:
    if graph.name not in choice.inputs:
        raise UsageError(
            f"inference of {graph.name} has no inputs",
            where=graph.bundle,
            remedy="Name an .npz for it under inputs, or ask for profile, which runs on random values",
        )
    read_inputs(root / choice.inputs[graph.name], graph)


def plan(
    matrix: Matrix,
    root: Path,
    chosen: tuple[tuple[BundleChoice, tuple[HubGraph, ...]], ...],
    chipsets: Mapping[str, str | None],
) -> tuple[Step, ...]:
    """Every job of the matrix, each after the jobs it needs. The same content plans the same keys.

    Args:
        chipsets: of the devices, as far as they are known.
    """
    steps: list[Step] = []
    for device in matrix.devices:
        for choice, graphs in chosen:
            made: dict[str, str] = {}
            if "compile" in matrix.jobs:
                compiled = [_step("compile", matrix, graph, device) for graph in graphs]
                steps += compiled
                made = {graph.name: step.key for graph, step in zip(graphs, compiled, strict=True)}
            if "link" in matrix.jobs:
                linked = _step("link", matrix, graphs[0], device, tuple(made.values()), of=graphs)
                steps.append(linked)
                made = dict.fromkeys(made, linked.key)
            for graph in graphs:
                needs = (made[graph.name],) if made else ()
                if "profile" in matrix.jobs:
                    steps.append(_step("profile", matrix, graph, device, needs))
                if "inference" in matrix.jobs:
                    inputs = root / choice.inputs[graph.name]
                    steps.append(_step("inference", matrix, graph, device, needs, inputs=inputs))
    return tuple(step.model_copy(update={"chipset": chipsets.get(step.device)}) for step in steps)


def _step(
    kind: Kind,
    matrix: Matrix,
    graph: HubGraph,
    device: str,
    needs: tuple[str, ...] = (),
    *,
    of: tuple[HubGraph, ...] = (),
    inputs: Path | None = None,
) -> Step:
    name = " + ".join(part.name for part in of) or graph.name
    options: str = getattr(matrix.options, kind).replace("{graph}", graph.name)
    inputs_sha256 = None if inputs is None else hashlib.sha256(inputs.read_bytes()).hexdigest()
    identity = (kind, device, graph.bundle, name, graph.sha256, needs, options, inputs_sha256)
    return Step(
        key=hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
        kind=kind,
        device=device,
        chipset=None,
        bundle=graph.bundle,
        graph=name,
        graph_sha256=graph.sha256,
        needs=needs,
        options=options,
        inputs=None if inputs is None else str(inputs),
        inputs_sha256=inputs_sha256,
    )
