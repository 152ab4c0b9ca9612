"""A workload on a bundle: everything `edgephi bench DIR` measures, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from edgephi.benchmarks.bench import loading, schedule
from edgephi.benchmarks.bench.cases import Case, Prompts, plan
from edgephi.benchmarks.bench.derive import derive
from edgephi.benchmarks.bench.measure import Instruments, Sample, measure
from edgephi.benchmarks.bench.meters import conditions
from edgephi.benchmarks.bench.meters.energy import Meter, find_meter, idle_watts
from edgephi.benchmarks.bench.og_loop import OgLoop
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
from edgephi.benchmarks.bench.roofline import Readings, measure_machine, roofline, with_shares
from edgephi.benchmarks.bench.work import graph_work
from edgephi.benchmarks.bench.workload import Workload
from edgephi.benchmarks.report import library_versions, machine
from edgephi.bundle import Manifest, check_bundle, read_manifest
from edgephi.devices.power import power_mode, power_source
from edgephi.devices.providers import all_providers, require_known_graphs
from edgephi.errors import QualityError
from edgephi.runtime import dispatch
from edgephi.runtime.config import decode_file, read_config
from edgephi.runtime.golden import reproduce
from edgephi.runtime.model import Model, load
from edgephi.runtime.place import Place
from edgephi.runtime.prepacked.cache import prepack, prepacked_files, prepacking
from edgephi.runtime.templates import read_template, user_message
from edgephi.runtime.tokenizer import Tokenizer

LIBRARIES = (
    "edgephi",
    "onnxruntime",
    "onnxruntime-genai",
    *(wheel for known in all_providers() if known.runs_graphs and known.short != "cpu" for wheel in known.wheels),
    "tokenizers",
    "numpy",
)

OnProgress = Callable[[int, int], None]
"""Told (done, in all), in the unit of `Case.cost`."""


@dataclass(frozen=True)
class _Measured:
    cases: list[CaseResult]
    quality: QualityCheck
    place: Place
    providers: tuple[str, ...]
    threads: int
    idle_w: float | None
    prepacked: bool
    roofline: Roofline | None


def bench(
    folder: Path,
    workload: Workload,
    *,
    device: str = "auto",
    spinning: bool | None = None,
    progress: OnProgress = lambda done, total: None,
) -> Report:
    """Measure a bundle.

    Args:
        device, spinning: as for `edgephi.load`; loads are timed without the second.

    Raises:
        BundleError: the folder is not an intact bundle.
        DeviceError: the device cannot run it. There is no fallback: a figure belongs to the device that was asked for.
        QualityError: the bundle does not answer as its quality contract records, so its speed is worth nothing.
        EdgephiError: it cannot be run.
    """
    started, created = perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    check_bundle(folder, manifest, every_byte=False)
    cases, refused = plan(workload, _prompts(folder, manifest, device))
    content = workload.content
    total = schedule.planned_cost(cases, content.method) + (loading.planned_cost(content.load) if content.load else 0)
    done = 0

    def advance(cost: int) -> None:
        nonlocal done
        done += cost
        progress(done, total)

    instruments, meter = Instruments(), find_meter()
    usage, heat = instruments.usage(), conditions.thermal()
    loads: list[CaseResult] = []
    if content.load:
        files = [*(folder / entry.path for entry in manifest.files), *_prepack(folder, manifest, device)]
        loads = loading.measure_loading(
            files, content.load, content.method, loading.process_probe(folder, device), advance=advance
        )
    measured = _timed(folder, manifest, workload, device, spinning, cases, instruments, meter, advance)
    rest = [schedule.described(case, reason) for case, reason in refused]
    results = tuple(_in_order([*loads, *measured.cases, *rest]))
    spent, heat_after = instruments.usage().since(usage), conditions.thermal()
    throttles = None
    if heat.throttles is not None and heat_after.throttles is not None:
        throttles = heat_after.throttles - heat.throttles
    method = content.method
    return Report(
        edgephi=library_versions("edgephi").get("edgephi", "unknown"),
        created=created,
        seconds=perf_counter() - started,
        device=device,
        provider=measured.place.choice.provider,
        profile=measured.place.choice.profile,
        hardware=_hardware(measured.place),
        providers=measured.providers,
        threads=measured.threads,
        bundle=bundle_facts(folder, manifest),
        machine=Machine(**machine()),
        versions=library_versions(*LIBRARIES),
        workload=WorkloadFacts(
            name=workload.name,
            description=content.description,
            sha256=workload.sha256,
            warmups=method.warmups,
            repetitions=method.repetitions,
            pause_s=method.pause_s,
            seed=method.seed,
        ),
        conditions=Conditions(
            power_source=power_source(),
            power_mode=power_mode(),
            temperature_start_c=heat.hottest_c,
            temperature_end_c=heat_after.hottest_c,
            throttle_events=throttles,
            others_cpu_share=spent.others_share,
            energy=EnergyConditions(
                source=meter.source if isinstance(meter, Meter) else None,
                reason=None if isinstance(meter, Meter) else meter,
                idle_w=measured.idle_w,
            ),
        ),
        quality=measured.quality,
        prepacked=measured.prepacked,
        spinning=SpinningChoice(**asdict(measured.place.choice.spinning)),
        roofline=measured.roofline,
        cases=results,
        derived=derive(results, content.score),
    )


def bundle_facts(folder: Path, manifest: Manifest) -> BundleFacts:
    """What the manifest says about the bundle; its hash covers every file but edgephi.json."""
    lines = sorted(f"{entry.path}\0{entry.sha256}\n" for entry in manifest.files)
    return BundleFacts(
        name=folder.resolve().name,
        sha256=hashlib.sha256("".join(lines).encode()).hexdigest(),
        family=manifest.model.family,
        parameters=manifest.model.parameters,
        precision=manifest.recipe.precision,
        accuracy_level=manifest.recipe.accuracy_level,
        stored_bytes=manifest.stored_bytes,
        source=manifest.source.name,
    )


def _prepack(folder: Path, manifest: Manifest, device: str) -> Sequence[Path]:
    """The files a load from the user's cache reads, written now: else one of the loads to be timed would write them."""
    choice = dispatch.plan(folder, manifest, device, fallback=False).choices[0]
    mode = prepacking(None)
    if choice.provider != "cpu" or choice.graph is None:
        return []
    prepack(folder, manifest, decode_file(choice.graph), mode)  # the first load only takes note
    return prepacked_files(prepack(folder, manifest, decode_file(choice.graph), mode))


def _timed(
    folder: Path,
    manifest: Manifest,
    workload: Workload,
    device: str,
    spinning: bool | None,
    cases: list[Case],
    instruments: Instruments,
    meter: Meter | str,
    advance: schedule.Advance,
) -> _Measured:
    method = workload.content.method
    idle_w = resolution = None
    if isinstance(meter, Meter) and method.idle_s > 0:
        # before anything is loaded: the runtime's threads spin for a while after their last work
        idle_w, resolution = idle_watts(meter, method.idle_s), meter.resolution_j
        instruments = replace(instruments, joules=meter.joules)
    with load(folder, device, spinning=spinning) as model:
        quality = _check_quality(model, manifest)
        loop = OgLoop(folder, model.place, model.threads, instruments)

        def run(case: Case) -> Sample:
            return loop.run(case) if case.by_og else measure(model.open_sequence, case, instruments)

        readings = _readings(model, manifest, cases)
        try:
            tallies = schedule.run_cases(cases, run, method, advance=advance)
        finally:
            loop.close()
        results = [schedule.result(case, tally, idle_w, resolution) for case, tally in zip(cases, tallies, strict=True)]
        limits = None
        if readings is not None and (graph := model.place.choice.graph) is not None:
            work = graph_work(folder / decode_file(graph))
            limits = roofline((readings, _readings(model, manifest, cases) or {}), model.threads, work)
            results = [with_shares(one, work, limits) for one in results]
        providers = tuple(part.provider for part in model.placement.providers)
        mapped = model.prepacked.folder is not None
        return _Measured(results, quality, model.place, providers, model.threads, idle_w, mapped, limits)


def _readings(model: Model, manifest: Manifest, cases: Sequence[Case]) -> Readings | None:
    """The processor's ceilings, where it is the processor that computes cases with a share."""
    if model.place.choice.provider != "cpu" or not any(case.group in ("prefill", "decode") for case in cases):
        return None
    linear = next((one for one in manifest.recipe.weights if one.weights == "linear"), None)
    bits, block = (linear.bits, linear.block_size) if linear is not None else (4, 32)
    return measure_machine(model.threads, 8 if bits > 4 else 4, block or 32)


def _check_quality(model: Model, manifest: Manifest) -> QualityCheck:
    if manifest.quality is None:
        return QualityCheck(contract="not recorded", golden_tokens=0, near_ties=0)
    found = reproduce(model, manifest.quality.golden)
    broken = [flip for flip in found.flips if not flip.is_near_tie]
    if broken:
        raise QualityError(
            f"the answer to {broken[0].prompt!r} is not the recorded one from token {broken[0].position + 1}, "
            "so the speed of this bundle is worth nothing",
            where=model.folder,
            remedy="See what changed with `edgephi verify --run`",
        )
    return QualityCheck(contract="held", golden_tokens=found.tokens, near_ties=len(found.flips))


def _hardware(place: Place) -> str | None:
    if place.device is None:
        return None
    one = place.device
    return f"{one.vendor} {one.kind}, vendor {one.vendor_id:#06x}, device {one.device_id:#06x}"


def _prompts(folder: Path, manifest: Manifest, device: str) -> Prompts:
    """The tokenizer, the template and the context, read without loading the model."""
    limit = dispatch.plan(folder, manifest, device, fallback=False).choices[0].context_length
    config, tokenizer, template = read_config(folder, manifest), Tokenizer(folder), read_template(folder)
    return Prompts(
        plain=lambda text: tokenizer.encode(text, special=True),
        chat=None if template is None else lambda text: tokenizer.encode(template.render([user_message(text)])),
        stop_ids=config.stop_ids,
        context_length=min(config.context_length, limit or config.context_length),
        rope_switch=manifest.model.rope_switch,
        og_runs=manifest.npu is None,
    )


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
