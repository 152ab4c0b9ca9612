"""Reports with simulated repetitions, for tests of what is read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgephi.benchmarks.bench.results import (
    BundleFacts,
    CaseResult,
    Ceiling,
    Conditions,
    Derived,
    EnergyConditions,
    Group,
    Machine,
    Metric,
    QualityCheck,
    Reading,
    Report,
    Roofline,
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


def everything(name: str = "Phi-4-mini-instruct-int4-with-a-name-that-a-person-chose") -> Report:
    """A report with every kind of case, several lines in a chart, noise, a trace, energy and a ceiling's outlier."""
    lengths, depths = (16, 64, 128, 256, 512, 1024, 4096, 16384), (0, 512, 1024, 2048, 16000)
    noise = (0.97, 1.0, 1.01, 1.004)
    cases = [
        case(
            "load, warm",
            "load",
            {
                "load_s": [0.24, 0.25, 0.26],
                "load_to_first_token_s": [0.3, 0.31, 0.3],
                "steady_private_bytes": [6.9e7] * 3,
                "peak_resident_bytes": [2.64e8] * 3,
            },
        )
    ]
    for depth in (0, 2048):
        for length in lengths:
            rates = [1500 / (1 + (length + depth) / 5000) * one for one in noise]
            figures: dict[Metric, Sequence[float]] = {
                "prefill_tokens_per_s": rates,
                "time_to_first_token_s": [length / rate for rate in rates],
                "int8_share": [rate / 9000 for rate in rates],
                "cpu_share": [1.0 - 1e-12, 1.0, 1.0, 1.0 + 1e-12],
            }
            said = f"prefill {length}" + (f" at depth {depth}" if depth else "")
            cases.append(case(said, "prefill", figures, prompt_tokens=length, depth=depth))
    for depth in depths:
        rates = [220 / (1 + depth / 3000) * one for one in noise]
        figures = {
            "decode_tokens_per_s": rates,
            "inter_token_p99_s": [1.4 / rate for rate in rates],
            "bandwidth_share": [rate / 450 for rate in rates],
            "energy_per_token_j": [30 / rate for rate in rates],
        }
        cases.append(case(f"decode 32 at depth {depth}", "decode", figures, depth=depth, noisy=depth < 1024))
    cases.append(case("decode 32 at depth 65536", "decode", {}, state="not measured", reason="the model has 16,384"))
    for length, kind in enumerate(("a short question", "a summary of a long text", "code"), 1):
        figures = {"time_to_first_token_s": [0.2 * length] * 3, "decode_tokens_per_s": [100 / length, 90 / length, 95]}
        cases.append(case(kind, "answer", figures, prompt_tokens=300 * length**2))
    quiet = Ceiling(per_s=figure([4.5e10, 4.6e10, 4.7e10, 4.8e10]), method="reading an array")
    peak = Ceiling(per_s=figure([4.9e11, 5e11, 5e11, 6.4e11, 6.5e11, 1.74e12]), method="MatMulInteger")
    limits = Roofline(
        threads=2,
        bandwidth=quiet,
        int8=peak,
        matmul_nbits=quiet,
        weight_bytes=10**8,
        cache_bytes_per_token=46080,
        token_operations=10**8,
        head_operations=10**7,
    )
    trace = tuple(
        Reading(at_s=0.0069 + 10.02 * n, temperature_c=45 + 3 * n**0.5, clock_mhz=3600 - 20 * n) for n in range(12)
    )
    made = report(*cases, roofline=limits, trace=trace, label="desk", stopped="the time budget was used up")
    derived = (Derived(name="Procyon-style score", value=912.3, formula="sqrt(1250 / mean …)"),)
    return made.model_copy(update={"bundle": made.bundle.model_copy(update={"name": name}), "derived": derived})
