"""Reports with simulated repetitions, for tests of what is read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgephi.benchmarks.bench.results import (
    BundleFacts,
    CaseResult,
    Conditions,
    EnergyConditions,
    Group,
    Machine,
    Metric,
    QualityCheck,
    Report,
    WorkloadFacts,
    figure,
)


def case(name: str, group: Group, figures: Mapping[Metric, Sequence[float]], **changes: object) -> CaseResult:
    """A measured case."""
    made = CaseResult(
        name=name,
        group=group,
        category=group,
        depth=0,
        prompt_tokens=8,
        new_tokens=8,
        templated=False,
        prompt_sha256="p",
        tokens_sha256="t",
        state="measured",
        figures={metric: figure(list(values)) for metric, values in figures.items()},
    )
    return made.model_copy(update=changes)


def report(*cases: CaseResult, **changes: object) -> Report:
    """A report of a machine that says little about itself."""
    made = Report(
        edgephi="0.1.0",
        created="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        device="auto",
        provider="cpu",
        profile=None,
        hardware=None,
        providers=("CPUExecutionProvider",),
        threads=2,
        bundle=BundleFacts(
            name="tiny",
            sha256="b" * 64,
            family="llama",
            parameters=1000,
            precision="int4",
            accuracy_level=4,
            stored_bytes=1000,
            source="org/tiny",
        ),
        machine=Machine(cpu="A", cores="2", memory="8 GiB", system="Linux", python="3.12"),
        versions={"onnxruntime": "1.31.1"},
        workload=WorkloadFacts(name="w", description="d", sha256="c" * 64, warmups=1, repetitions=8, pause_s=0, seed=1),
        conditions=Conditions(
            power_source=None,
            power_mode=None,
            temperature_start_c=None,
            temperature_end_c=None,
            throttle_events=None,
            others_cpu_share=0.01,
            energy=EnergyConditions(source=None, reason="there is no meter", idle_w=None),
        ),
        quality=QualityCheck(contract="not recorded", golden_tokens=0, near_ties=0),
        cases=cases,
        derived=(),
    )
    return made.model_copy(update=changes)
