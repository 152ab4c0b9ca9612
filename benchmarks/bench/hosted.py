"""What hosted devices measured, as reports that stand in the tables of `edgephi bench`.

A hosted device runs one graph at a time, on random values, and not a model: the layers that the NPU computes are timed,
and the embedding, the head and the choice of a token are not. So these reports have a workload of their own, and no
table puts them beside figures of whole answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from edgephi.benchmarks.bench.assemble import NO_CONTRACT
from edgephi.benchmarks.bench.loading import load_case
from edgephi.benchmarks.bench.report.output import write_report
from edgephi.benchmarks.bench.results import (
    BundleFacts,
    CaseResult,
    Conditions,
    Derived,
    EnergyConditions,
    Figure,
    Machine,
    Report,
    WorkloadFacts,
    figure,
)
from edgephi.devices.ai_hub.hosted import HostedBundle
from edgephi.devices.ai_hub.report import FleetReport, JobRecord, Measurement

WORKLOAD = "hosted NPU graphs"
DESCRIPTION = (
    "Profile jobs of Qualcomm AI Hub on a hosted device. Each graph of the NPU ran alone, on random values. A rate is "
    "the tokens of a run over the sum of the graphs' times; embedding, head, sampling and what passes between graphs "
    "are not in it. Load is the sum of the graphs' loads. The hub measured; edgephi read its profiles."
)
PROVIDER = "ai-hub"
NOT_STATED = "not stated"
FOLDER = "bench"
MOST_VALUES = 200
"""Of a figure."""

_Phase = Literal["prefill", "decode"]


def write_hosted_reports(fleet: FleetReport, output: Path) -> list[Path]:
    """A report folder for every device and bundle with a measured NPU graph, in `output`/bench; older ones go.

    Raises:
        OutputError: the disk refuses.
    """
    written = []
    for report in hosted_reports(fleet):
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{report.device}-{report.bundle.name}").strip("-.")[:80]
        key = hashlib.sha256(f"{report.device}\0{report.bundle.name}".encode()).hexdigest()[:8]
        folder = output / FOLDER / f"{name}-{key}"
        write_report(folder, report, force=True)
        written.append(folder)
    return written


def hosted_reports(fleet: FleetReport) -> list[Report]:
    """In the order of the plan; of a bundle that was exported again, only jobs of its present graphs count."""
    places: dict[tuple[str, str], list[JobRecord]] = {}
    for record in fleet.records:
        bundle = fleet.bundles.get(record.bundle)
        graph = bundle.graphs.get(record.graph) if bundle else None
        if graph is not None and record.kind == "profile" and record.graph_sha256 == graph.sha256:
            places.setdefault((record.device, record.bundle), []).append(record)
    found = []
    for (_, name), records in places.items():
        if any(record.measured for record in records):
            found.append(_report(fleet, fleet.bundles[name], records))
    return found


def _report(fleet: FleetReport, bundle: HostedBundle, records: Sequence[JobRecord]) -> Report:
    first = records[0]
    measured = {record.graph: record.measured for record in records if record.measured is not None}
    chip = first.chipset or "chip not stated"
    lost = len(bundle.graphs) - len(measured)
    counts = [len(one.inference_times_s) for one in measured.values()]
    return Report(
        edgephi=fleet.edgephi,
        created=fleet.created,
        seconds=sum(sum(one.inference_times_s) for one in measured.values()),
        device=first.device,
        provider=PROVIDER,
        profile=None,
        hardware=f"{first.device} ({chip}), hosted",
        providers=(),
        threads=0,
        bundle=BundleFacts(name=first.bundle, **bundle.model_dump(exclude={"graphs", "cache_rows"})),
        machine=Machine(
            cpu=chip, cores=NOT_STATED, memory=NOT_STATED, system=first.device_os or NOT_STATED, python=NOT_STATED
        ),
        versions={"qai-hub": fleet.qai_hub, **{name: tool for one in records for name, tool in one.tools.items()}},
        workload=WorkloadFacts(
            name=WORKLOAD,
            description=DESCRIPTION,
            sha256=hashlib.sha256(DESCRIPTION.encode()).hexdigest(),
            warmups=0,
            repetitions=max([1, *counts]),
            pause_s=0.0,
            seed=0,
        ),
        conditions=Conditions(
            power_source=None,
            power_mode=None,
            temperature_start_c=None,
            temperature_end_c=None,
            throttle_events=None,
            others_cpu_share=None,
            energy=EnergyConditions(source=None, reason="the hub measures none", idle_w=None),
        ),
        quality=NO_CONTRACT,
        label=first.device[:120],
        stopped=f"{lost} of {len(bundle.graphs)} graphs have no profile" if lost else None,
        cases=(_load(measured, bundle), *(_phase(phase, measured, bundle) for phase in _phases(bundle))),
        derived=_layers(measured),
    )


def _phases(bundle: HostedBundle) -> list[_Phase]:
    return sorted({graph.phase for graph in bundle.graphs.values()}, reverse=True)  # prefill, then decode


def _phase(phase: _Phase, measured: dict[str, Measurement], bundle: HostedBundle) -> CaseResult:
    """A run of every graph of a phase, one after the other: the layers of a piece of a prompt, or of a token."""
    graphs = [name for name, graph in bundle.graphs.items() if graph.phase == phase]
    tokens = bundle.graphs[graphs[0]].tokens
    runs = [measured[name] for name in graphs if name in measured]
    rows = f", {bundle.cache_rows} rows of cache"
    case = CaseResult(
        name=f"{'prefill ' + str(tokens) if phase == 'prefill' else 'decode'}, {len(graphs)} graphs{rows}",
        group=phase,
        category=phase,
        depth=0,
        prompt_tokens=tokens if phase == "prefill" else 0,
        new_tokens=0 if phase == "prefill" else 1,
        templated=False,
        prompt_sha256=None,
        tokens_sha256=None,
        state="measured",
    )
    if len(runs) < len(graphs):
        reason = f"{len(graphs) - len(runs)} of its {len(graphs)} graphs have no profile"
        return case.model_copy(update={"state": "not measured", "reason": reason})
    metric = "prefill_tokens_per_s" if phase == "prefill" else "decode_tokens_per_s"
    return case.model_copy(update={"figures": {metric: _rate(tokens, runs)}})


def _rate(tokens: int, runs: Sequence[Measurement]) -> Figure:
    """Of a single graph every repetition, where the hub keeps them; of several the sum of the hub's estimates, because
    repetitions of different jobs have nothing to do with each other."""
    (first, *others) = runs
    times = first.inference_times_s
    if others or not 0 < len(times) <= MOST_VALUES or min(times) <= 0:
        times = (max(1e-9, sum(one.inference_s for one in runs)),)
    return figure([tokens / time for time in times])


def _load(measured: dict[str, Measurement], bundle: HostedBundle) -> CaseResult:
    name = f"load, warm, {len(bundle.graphs)} graphs"
    loads = [measured[graph].warm_load_s for graph in bundle.graphs if graph in measured]
    known = [load for load in loads if load is not None]
    if len(known) < len(bundle.graphs):
        return load_case(name, {}, reason="the hub has no warm load of one of its graphs")
    return load_case(name, {"load_s": [sum(known)]})


def _layers(measured: dict[str, Measurement]) -> tuple[Derived, ...]:
    layers = [one.layers for one in measured.values()]
    total = sum(one.npu + one.gpu + one.cpu + one.unknown for one in layers)
    if not total:
        return ()
    share = sum(one.npu for one in layers) / total
    formula = f"of {total} layers of {len(layers)} graphs, as the hub's profiles count them"
    peaks = [one.peak_memory for one in measured.values() if one.peak_memory is not None]
    found = [Derived(name="share of layers on the NPU", value=share, formula=formula)]
    if peaks:
        formula = "the most of one graph while it ran, in MB, as the hub estimates it"
        found.append(Derived(name="peak memory of a graph, MB", value=max(peaks) / 1e6, formula=formula))
    return tuple(found)
