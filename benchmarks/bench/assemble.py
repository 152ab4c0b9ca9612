"""What is known of a run so far becomes a report: at its end, after every round, and when it is interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Literal

from edgephi.benchmarks.bench import schedule
from edgephi.benchmarks.bench.cases import Case
from edgephi.benchmarks.bench.derive import derive
from edgephi.benchmarks.bench.meters import conditions
from edgephi.benchmarks.bench.meters.energy import Meter
from edgephi.benchmarks.bench.meters.trace import Trace
from edgephi.benchmarks.bench.meters.usage import Usage, read_usage
from edgephi.benchmarks.bench.results import (
    BundleFacts,
    CaseResult,
    Conditions,
    EnergyConditions,
    Machine,
    QualityCheck,
    Report,
    Roofline,
    SpinningChoice,
    WorkloadFacts,
)
from edgephi.benchmarks.bench.workload import Workload
from edgephi.benchmarks.report import library_versions, machine
from edgephi.bundle import Manifest, contents_sha256
from edgephi.devices.power import power_mode, power_source
from edgephi.devices.providers import all_providers
from edgephi.runtime.placement.place import Place

LIBRARIES = (
    "edgephi",
    "onnxruntime",
    "onnxruntime-genai",
    *(wheel for known in all_providers() if known.runs_graphs and known.short != "cpu" for wheel in known.wheels),
    "tokenizers",
    "numpy",
)

NO_CONTRACT = QualityCheck(contract="not recorded", golden_tokens=0, near_ties=0)


@dataclass
class SoFar:
    """A run at some moment; what it does not know yet has the value of a run that was stopped there."""

    folder: Path
    manifest: Manifest
    workload: Workload
    device: str
    label: str | None
    refused: Sequence[tuple[Case, str]]
    meter: Meter | str
    place: Place
    """Planned; once the model is loaded, proved."""
    loads: list[CaseResult] = field(default_factory=list)
    cases: list[CaseResult] = field(default_factory=list)
    providers: tuple[str, ...] = ()
    threads: int = 1
    quality: QualityCheck = NO_CONTRACT
    prepacked: bool | None = None
    prefill: Literal["blocks", "integers"] | None = None
    idle_w: float | None = None
    roofline: Roofline | None = None
    trace: Trace = field(default_factory=Trace)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    started: float = field(default_factory=perf_counter)
    usage: Usage = field(default_factory=read_usage)
    heat: conditions.Thermal = field(default_factory=conditions.thermal)

    def report(self, stopped: str | None) -> Report:
        """A whole report.

        Args:
            stopped: why something is missing; None: nothing is.
        """
        rest = [schedule.described(case, reason) for case, reason in self.refused]
        results = tuple(_in_order([*self.loads, *self.cases, *rest]))
        content, choice = self.workload.content, self.place.choice
        return Report(
            edgephi=library_versions("edgephi").get("edgephi", "unknown"),
            created=self.created,
            seconds=perf_counter() - self.started,
            device=self.device,
            provider=choice.provider,
            profile=choice.profile,
            hardware=_hardware(self.place, self.manifest),
            providers=self.providers,
            threads=self.threads,
            bundle=bundle_facts(self.folder, self.manifest),
            machine=Machine(**machine()),
            versions=library_versions(*LIBRARIES),
            workload=WorkloadFacts(
                name=self.workload.name,
                description=content.description,
                sha256=self.workload.sha256,
                warmups=content.method.warmups,
                repetitions=content.method.repetitions,
                pause_s=content.method.pause_s,
                seed=content.method.seed,
            ),
            conditions=self._conditions(),
            quality=self.quality,
            prepacked=self.prepacked,
            prefill=self.prefill,
            spinning=SpinningChoice(**asdict(choice.spinning)),
            roofline=self.roofline,
            label=self.label,
            stopped=stopped,
            trace=self.trace.readings(),
            cases=results,
            derived=derive(results, content.score),
        )

    def _conditions(self) -> Conditions:
        spent, heat = read_usage().since(self.usage), conditions.thermal()
        throttles = None
        if self.heat.throttles is not None and heat.throttles is not None:
            throttles = heat.throttles - self.heat.throttles
        metered = isinstance(self.meter, Meter)
        return Conditions(
            power_source=power_source(),
            power_mode=power_mode(),
            temperature_start_c=self.heat.hottest_c,
            temperature_end_c=heat.hottest_c,
            throttle_events=throttles,
            others_cpu_share=spent.others_share,
            energy=EnergyConditions(
                source=self.meter.source if isinstance(self.meter, Meter) else None,
                reason=None if metered else str(self.meter),
                idle_w=self.idle_w,
            ),
        )


def bundle_facts(folder: Path, manifest: Manifest) -> BundleFacts:
    """What the manifest says about the bundle; its hash covers every file but edgephi.json."""
    return BundleFacts(
        name=folder.resolve().name,
        sha256=contents_sha256(manifest),
        family=manifest.model.family,
        parameters=manifest.model.parameters,
        precision=manifest.recipe.precision,
        accuracy_level=manifest.recipe.accuracy_level,
        stored_bytes=manifest.stored_bytes,
        source=manifest.source.name,
    )


def _hardware(place: Place, manifest: Manifest) -> str | None:
    """The provider's device, in words; None: the processor."""
    if manifest.npu is not None:  # its graphs are tried when they are opened, so the place names no device
        simulated = "npu-simulator" in place.choice.kinds
        return f"NPU of {manifest.npu.target}" + (", simulated on the CPU" if simulated else "")
    if place.device is None:
        return None
    one = place.device
    return f"{one.vendor} {one.kind}, vendor {one.vendor_id:#06x}, device {one.device_id:#06x}"


def _in_order(cases: list[CaseResult]) -> list[CaseResult]:
    """By group, then as the workload has them; a refused depth stands where it belongs."""
    groups = ("load", "prefill", "decode", "answer", "speculation")
    by_size = {"prefill", "decode"}
    return sorted(
        cases,
        key=lambda case: (
            groups.index(case.group),
            (case.depth, case.prompt_tokens) if case.group in by_size else (0, 0),
        ),
    )
