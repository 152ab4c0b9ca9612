"""A workload on a bundle: everything `edgephi bench DIR` measures, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from edgephi.benchmarks.bench import loading, schedule
from edgephi.benchmarks.bench.assemble import NO_CONTRACT, SoFar
from edgephi.benchmarks.bench.cases import Case, Prompts, plan
from edgephi.benchmarks.bench.measure import Instruments, Sample, measure
from edgephi.benchmarks.bench.meters.energy import Meter, find_meter, idle_watts
from edgephi.benchmarks.bench.og_loop import OgLoop
from edgephi.benchmarks.bench.pace import INTERRUPTED, Pace, TimeLeft
from edgephi.benchmarks.bench.results import CaseResult, QualityCheck, Report
from edgephi.benchmarks.bench.roofline import Readings, measure_machine, roofline, with_shares
from edgephi.benchmarks.bench.work import graph_work
from edgephi.benchmarks.bench.workload import Workload
from edgephi.benchmarks.evaluate.golden import reproduce
from edgephi.bundle import Manifest, check_bundle, read_manifest
from edgephi.devices.providers import require_known_graphs
from edgephi.errors import QualityError
from edgephi.runtime.integers import PrefillChoice
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.placement import dispatch
from edgephi.runtime.placement.config import decode_file, read_config
from edgephi.runtime.placement.place import Place
from edgephi.runtime.prepacked.packing import prepack, prepacked_files, prepacking
from edgephi.runtime.text.templates import read_template, user_message
from edgephi.runtime.text.tokenizer import Tokenizer

OnProgress = Callable[[int, int, float | None], None]
"""Told (done, in all), in the unit of `Case.cost`, and the seconds left, or None where they are not known."""

OnKept = Callable[[Report], None]
"""Given what is known so far, so that a crash does not lose it."""

RUNNING = "the run did not end"
KEEP_S = 5.0
"""Seconds after which what is known is kept within a round too: a round of a long workload takes minutes."""


def bench(
    folder: Path,
    workload: Workload,
    *,
    device: str = "auto",
    threads: int | None = None,
    spinning: bool | None = None,
    prefill: PrefillChoice | None = None,
    label: str | None = None,
    pace: Pace | None = None,
    progress: OnProgress = lambda done, total, left: None,
    keep: OnKept = lambda report: None,
) -> Report:
    """Measure a bundle.

    Args:
        device, threads, spinning, prefill: as for `edgephi.load`; loads are timed without
            threads and spinning, and with prompts as EDGEPHI_PREFILL says.
        label: what the user calls this machine or run.
        pace: the time budget. With one, Ctrl-C gives a report of what was measured, whose `stopped` says so; without,
            it is raised.
        keep: called after the loads, after every round, and within one every `KEEP_S` seconds, between two runs.

    Raises:
        BundleError: the folder is not an intact bundle.
        DeviceError: the device cannot run it. There is no fallback: a figure belongs to the device that was asked for.
        QualityError: the bundle does not answer as its quality contract records, so its speed is worth nothing.
        EdgephiError: it cannot be run.
    """
    manifest = read_manifest(folder)
    require_known_graphs(folder, manifest)
    check_bundle(folder, manifest, every_byte=False)
    cases, refused = plan(workload, prompts_of(folder, manifest, device))
    place = Place(dispatch.plan(folder, manifest, device, fallback=False).choices[0])
    run = SoFar(folder, manifest, workload, device, label, refused, find_meter(), place)
    run.threads = threads or place.threads
    content = workload.content
    total = schedule.planned_cost(cases, content.method) + (loading.planned_cost(content.load) if content.load else 0)
    left = TimeLeft(cases, content.method)
    done = 0

    def advance(cost: int) -> None:
        nonlocal done
        done += cost
        run.trace.read()
        progress(done, total, left.seconds())

    run.cases = [schedule.described(case, "the run stopped before it") for case in cases]
    advance(0)
    with _within(pace):
        if content.load:
            probe = loading.process_probe(folder, device)
            files = [*(folder / entry.path for entry in manifest.files), *_prepack(folder, manifest, device)]
            before = pace.check if pace else lambda: None
            loading.measure_loading(
                files, content.load, content.method, probe, advance=advance, before=before, into=run.loads
            )
            keep(run.report(RUNNING))
        _measure_cases(run, cases, threads, spinning, prefill, left, pace, advance, keep)
    return run.report(pace.stopped if pace else None)


def _prepack(folder: Path, manifest: Manifest, device: str) -> Sequence[Path]:
    """The files a load from the user's cache reads, written now: else one of the loads to be timed would write them."""
    choice = dispatch.plan(folder, manifest, device, fallback=False).choices[0]
    mode = prepacking(None)
    if choice.provider != "cpu" or choice.graph is None:
        return []
    graph, kernels = decode_file(choice.graph), choice.may_use_kleidiai
    prepack(folder, manifest, graph, mode, kleidiai=kernels)  # the first load only takes note
    return prepacked_files(prepack(folder, manifest, graph, mode, kleidiai=kernels))


def _measure_cases(
    run: SoFar,
    cases: list[Case],
    threads: int | None,
    spinning: bool | None,
    prefill: PrefillChoice | None,
    left: TimeLeft,
    pace: Pace | None,
    advance: schedule.Advance,
    keep: OnKept,
) -> None:
    """Everything that the loaded model is asked; what is known goes into `run` as soon as it is."""
    method, manifest, folder = run.workload.content.method, run.manifest, run.folder
    instruments = Instruments()
    resolution: float | None = None
    if isinstance(run.meter, Meter) and method.idle_s > 0:
        # before anything is loaded: the runtime's threads spin for a while after their last work
        run.idle_w, resolution = idle_watts(run.meter, method.idle_s), run.meter.resolution_j
        instruments = replace(instruments, joules=run.meter.joules)
    with load(folder, run.device, threads=threads, spinning=spinning, prefill=prefill) as model:
        run.place, run.threads = model.place, model.threads
        if model.prefill.by == "blocks" or manifest.quality is None:
            run.quality = _check_quality(model, manifest)
        else:  # the contract is the bundle's; integers are this machine's, and were proved when they were made
            with load(folder, run.device, threads=threads, prefill="blocks") as bundles_own:
                run.quality = _check_quality(bundles_own, manifest)
        run.providers = tuple(part.provider for part in model.placement.providers)
        run.prepacked, run.prefill = model.prepacked.folder is not None, model.prefill.by
        loop = OgLoop(folder, model.place, model.threads, instruments)

        def once(case: Case) -> Sample:
            return loop.run(case) if case.by_og else measure(model.open_sequence, case, instruments)

        tallies = [schedule.Tally() for _ in cases]

        def results() -> list[CaseResult]:
            pairs = zip(cases, tallies, strict=True)
            return [schedule.result(case, tally, run.idle_w, resolution) for case, tally in pairs]

        kept = time.monotonic()

        def keep_known() -> None:
            nonlocal kept
            run.cases = results()
            keep(run.report(RUNNING))
            kept = time.monotonic()

        def before() -> None:
            if pace is not None:
                pace.check()
            if time.monotonic() - kept >= KEEP_S:
                keep_known()

        began = time.monotonic()
        readings = _readings(model, manifest, cases)
        left.afterwards_s = time.monotonic() - began  # they are taken again at the end
        try:
            with _within(pace):
                schedule.run_cases(
                    cases,
                    once,
                    method,
                    tallies=tallies,
                    advance=advance,
                    before=before,
                    after_round=keep_known,
                    left=left,
                )
        finally:
            loop.close()
            run.cases = results()
        if pace is not None and pace.stopped == INTERRUPTED:
            return  # who interrupts does not want to wait for more readings
        if readings is not None and (graph := model.place.choice.graph) is not None:
            work = graph_work(folder / decode_file(graph))
            run.roofline = roofline((readings, _readings(model, manifest, cases) or {}), model.threads, work)
            run.cases = [with_shares(one, work, run.roofline) for one in run.cases]


def _within(pace: Pace | None) -> AbstractContextManager[None]:
    return nullcontext() if pace is None else pace.within()


def _readings(model: Model, manifest: Manifest, cases: Sequence[Case]) -> Readings | None:
    """The processor's ceilings, where it is the processor that computes cases with a share."""
    if model.place.choice.provider != "cpu" or not any(case.group in ("prefill", "decode") for case in cases):
        return None
    linear = next((one for one in manifest.recipe.weights if one.weights == "linear"), None)
    bits, block = (linear.bits, linear.block_size) if linear is not None else (4, 32)
    return measure_machine(model.threads, 8 if bits > 4 else 4, block or 32)


def _check_quality(model: Model, manifest: Manifest) -> QualityCheck:
    if manifest.quality is None:
        return NO_CONTRACT
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


def prompts_of(folder: Path, manifest: Manifest, device: str) -> Prompts:
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
