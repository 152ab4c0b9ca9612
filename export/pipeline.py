"""One call from SOURCE to bundle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import Literal, get_args

import edgephi
from edgephi.arguments import (
    require_choice,
    require_flag,
    require_integer,
    require_number,
    require_path,
    require_text,
    require_texts,
    wrong,
)
from edgephi.bundle import LONG_ROPE_ADAPTER, FileEntry, Manifest, NpuNumerics, describe_file, write_manifest
from edgephi.devices.hexagon import hexagon_target
from edgephi.errors import SourceError, UsageError
from edgephi.export.calibrate.budget import Mix, make_budget, settle
from edgephi.export.calibrate.gptq import pack_with_gptq
from edgephi.export.calibrate.kv_cache import KvCache, kv_tokens, settle_kv_cache, takes_float
from edgephi.export.calibrate.sensitivity import forget_sensitivities, measure_sensitivities
from edgephi.export.calibrate.text import calibration_tokens, describe_text, forget_tokens, require_text_file
from edgephi.export.checkpoint.source import require_revision
from edgephi.export.graph.block_sparse import prefill_chunk
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.graph.decoder import write_graph
from edgephi.export.graph.genai_config import write_genai_config
from edgephi.export.graph.rope_switch import write_long_rope_adapter
from edgephi.export.graph.variants import computing_in_half, plan_variants, require_devices
from edgephi.export.manifest import make_manifest
from edgephi.export.output import check_apart, check_disk, check_output, staged
from edgephi.export.plan import Plan, make_plan, unused_text
from edgephi.export.spec import Architecture, Checkpoint
from edgephi.export.tokenizer.files import write as write_tokenizer
from edgephi.export.weights.half_range import fit_to_half
from edgephi.export.weights.layout import Layout, Precision, Quantize, Recipe, make_recipe
from edgephi.export.weights.pack import pack_weights, source_bytes, weight_source_bytes
from edgephi.files import no_system_errors, refuse_path

GRAPH_ALLOWANCE = 32 * 2**20
"""Disk for graph, tokenizer and configuration, on top of the weights."""


@dataclass(frozen=True)
class Progress:
    """What a caller is told while an export runs, in bytes of the source."""

    done: int
    total: int


@no_system_errors(SourceError)
def export(
    source: str | Path,
    output: str | Path,
    *,
    precision: Precision = "int4",
    block_size: int = 32,
    accuracy_level: int = 4,
    quantize: Quantize = "auto",
    bits: float | None = None,
    target_size: str | int | None = None,
    revision: str | None = None,
    force: bool = False,
    via: Literal["edgephi", "optimum"] = "edgephi",
    calibration: str | Path | None = None,
    seed: int = 0,
    rotate: bool = False,
    head_bits: int = 8,
    kv_cache: KvCache = "auto",
    devices: Sequence[str] = ("cpu",),
    npu_numerics: NpuNumerics | None = None,
    npu_share_weights: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Export a published checkpoint to a bundle.

    Args:
        source: checkpoint folder (safetensors), .gguf file, hub id, or `ollama:NAME` for a model Ollama has pulled.
        output: folder to make; it appears whole or not at all.
        precision: int4 and int8 quantize the linear layers in blocks, with an int8 embedding and head;
            fp16 and fp32 store everything in that type.
        block_size: input channels that share a scale, for int4 and int8: 16, 32, 64, 128 or 256.
        accuracy_level: MatMulNBits: 4 computes with int8 activations (fast), 1 with float32 (for comparisons).
        quantize: for int4. rtn rounds everything to nearest; gptq fits every layer to calibration text that passes
            through the model layer by layer (experts are rounded). auto carries over what the source holds in 4-bit
            blocks of 32 (GGUF's Q4_0, Q4_1, Q4_K), provided that `block_size` is 32; beside these, what it holds in 5
            to 8 bits gets 8, and the rest is rounded. Where there is nothing to carry over it is gptq for models of up
            to a billion parameters, which takes minutes, or when `calibration` is given; else rtn.
        bits: a budget for int4: stored bits of all matrices over published parameters. Every linear weight then gets
            4 or 8 bits and a block size of its own, by what each costs the float model on the calibration text; those
            that are carried over stay what they are.
        target_size: the same budget in bytes of the data file, such as "105MB", "2.2GB", "100MiB" or a number.
        revision: branch, tag or commit, for a hub id.
        force: replace an existing bundle.
        via: who builds the graph; optimum does for decoders outside edgephi's families (the extra `optimum`).
        calibration: UTF-8 text for gptq, a budget and w4a16, of which the first 8,192 tokens count; None: the model
            samples its own.
        seed: of that sampling, and of the rotation.
        rotate: rotate the weights, which leaves the float model's logits as they are (`export/weights/rotation.py`);
            what the source holds in 4 bits is then quantized anew.
        head_bits: of int4's head; 4 makes it faster, and is for `quantize` gptq, which fits it, or rtn, which loses far
            more. Where the embedding serves as head, both are stored.
        kv_cache: type of keys and values in the CPU's graph that edgephi runs. int8 takes a quarter of float32's memory
            and, in long conversations, less time. auto takes it where weights are quantized and predictions change by
            at most 0.02 nats a token, which is measured; other runtimes' graphs keep float.
        devices: what to write graphs for: cpu (always), webgpu, directml. All read the same weights. Or one chip
            with a Hexagon NPU (`snapdragon-x-elite`), for which the layers are compiled; needs the extra `qnn`. A
            profile or .toml file whose decode begins with cpu gets a graph for tokens on the CPU.
        npu_numerics: of the layers on such a chip. w4a16, the default there, multiplies int4 weights, and int8 ones
            where that pays, by 16-bit activations in integers, over a KV cache of 8 bits; nothing is carried over.
            float16 computes in float16 with the CPU's blocks, and is the default where tokens are the CPU's.
        npu_share_weights: on such a chip, the graphs for prompts and for tokens share binaries: about half the size.
            QAIRT's simulator does not load them. They run on the chip only, and what they compute is compared with the
            CPU while they are made.
        on_progress: called from worker threads after every slice of the weights.

    Returns:
        What was written to edgephi.json.

    Raises:
        EdgephiError: see `edgephi/errors.py`; nothing is left behind.

    An export that was interrupted (Ctrl-C, a kill) continues from its last whole layer when it is called again with the
    same arguments, and gives the same bytes.
    """
    _check_types(source, output, revision, calibration, devices, on_progress)
    require_choice("precision", precision, get_args(Precision))
    require_choice("quantize", quantize, get_args(Quantize))
    require_choice("via", via, ("edgephi", "optimum"))
    require_choice("kv_cache", kv_cache, get_args(KvCache))
    if npu_numerics is not None:
        require_choice("npu_numerics", npu_numerics, get_args(NpuNumerics))
    for name, flag in (("force", force), ("rotate", rotate), ("npu_share_weights", npu_share_weights)):
        require_flag(name, flag)
    if bits is not None:
        bits = require_number("bits", bits)
    if target_size is not None and not isinstance(target_size, str):
        target_size = require_integer("target_size", target_size)
    block_size, head_bits = require_integer("block_size", block_size), require_integer("head_bits", head_bits)
    accuracy_level, seed = require_integer("accuracy_level", accuracy_level), require_integer("seed", seed)
    refuse_path(SourceError, source, calibration)
    output = Path(output)
    if seed < 0:
        raise UsageError(f"the seed is {seed}", remedy="Choose 0 or more")
    if not 0 <= accuracy_level <= 4:
        raise UsageError(f"the accuracy level is {accuracy_level}", remedy="Choose 0 to 4; 4 is fast")
    recipe = make_recipe(precision, block_size, accuracy_level, quantize, seed if rotate else None, head_bits)
    budget = make_budget(bits, target_size)
    if budget is not None and (precision, block_size) != ("int4", 32):
        raise UsageError(
            "a budget chooses bits and block sizes itself", remedy="Leave --precision and --block-size out"
        )
    text = None if calibration is None else Path(calibration)
    npu = hexagon_target(devices)
    if kv_cache == "int8" and (npu or via == "optimum"):
        raise UsageError(
            f"a KV cache in int8 is for the CPU's graph that edgephi builds, not for {'an NPU' if npu else 'optimum'}",
            remedy="Leave --kv-cache out",
        )
    if npu:
        if via != "edgephi" or budget is not None or recipe.head is not None:
            raise UsageError(
                "the NPU's graphs have one size of block and a head in 8 bits, and are edgephi's own",
                remedy="Leave --bits, --target-size, --head-bits and --via out",
            )
    elif npu_numerics is not None or npu_share_weights:
        asked = npu_numerics or "sharing weights between prompt and token graphs"
        raise UsageError(f"{asked} is for an NPU", remedy="Add --device snapdragon-x-elite, or leave it out")
    else:
        require_devices(devices)
    if via == "optimum":
        plain = budget is None and text is None and recipe.head is None and not rotate
        if set(devices) != {"cpu"} or quantize == "gptq" or not plain:
            raise UsageError(
                "optimum's graph is for the CPU, and its weights are only rounded",
                remedy="Leave --device, --rotate, --bits, --target-size, --head-bits, --calibration and --quantize "
                "out, or --via",
            )
    if text is not None:
        if npu is None and budget is None and (precision != "int4" or quantize == "rtn"):
            raise unused_text()
        require_text_file(text)
    require_revision(source, revision)
    # what is wrong with the arguments themselves comes first: it stays wrong wherever the output goes
    check_output(output, force)
    check_apart(source, output)
    if npu:
        from edgephi.export.npu.pipeline import export_for_npu

        return export_for_npu(
            source,
            output,
            recipe,
            npu,
            numerics=npu_numerics,
            share_weights=npu_share_weights,
            revision=revision,
            calibration=text,
            seed=seed,
            force=force,
            on_progress=on_progress,
        )
    if via == "optimum":
        from edgephi.export.optimum.export import export_via_optimum

        return export_via_optimum(source, output, recipe, revision=revision, force=force, on_progress=on_progress)
    plan = make_plan(source, recipe, revision=revision, devices=devices, budget=budget, calibration=text, seed=seed)
    return _carry_out(plan, output, force, devices, kv_cache, on_progress)


def _check_types(
    source: object, output: object, revision: object, calibration: object, devices: object, on_progress: object
) -> None:
    """Raises UsageError for arguments of another type than `export` names."""
    require_path("source", source, "the path of a checkpoint, ollama:NAME, or a hub id, as a text")
    require_path("output", output)
    if revision is not None:
        require_text("revision", revision, "a branch, tag or commit, as a text")
    if calibration is not None:
        require_path("calibration", calibration)
    require_texts("devices", devices, "a list of names, such as ['cpu', 'webgpu']")
    if on_progress is not None and not callable(on_progress):
        raise wrong("on_progress", on_progress, "a function that takes a Progress")


def _carry_out(
    plan: Plan,
    output: Path,
    force: bool,
    devices: Sequence[str],
    kv_cache: KvCache,
    on_progress: Callable[[Progress], None] | None,
) -> Manifest:
    architecture, recipe, layout, variants = plan.architecture, plan.recipe, plan.layout, plan.variants
    mix, text = plan.mix, plan.text
    check_disk(output, layout.bytes + GRAPH_ALLOWANCE + plan.aside_bytes)
    threads = min(4, os.cpu_count() or 1)
    key = export_key(plan.checkpoint, architecture, recipe, layout, mix, text.digest() if text else None)
    with (
        staged(output, force, key, lambda name: name == DATA_FILE) as (folder, journal),
        source_hashes(plan.checkpoint.files) as source_files,
        ThreadPoolExecutor(1, thread_name_prefix="edgephi-graph") as aside,
    ):
        write_genai_config(architecture.spec, plan.tokenizer, folder, prefill_chunk=prefill_chunk(architecture.spec))
        write_tokenizer(plan.tokenizer, folder)
        if architecture.spec.long_rope is not None:
            write_long_rope_adapter(folder / LONG_ROPE_ADAPTER)
        tried = sum(weight_source_bytes(architecture.weights[name]) for name in mix.weights) if mix else 0
        kv_work = 0 if takes_float(kv_cache, recipe) else source_bytes(architecture)
        reporter = Reporter(source_bytes(architecture) + tried + kv_work, on_progress)
        tokens = calibration_tokens(architecture, plan.tokenizer, text, folder, journal, threads) if text else None
        if mix and tokens is not None:
            errors = measure_sensitivities(architecture, mix.weights, tokens, folder, journal, reporter)
            layout = settle(architecture, recipe, mix, errors)
            variants = plan_variants(devices, architecture.spec, layout, recipe)
        layout = fit_to_half(architecture, replace(layout, half=computing_in_half(variants)))
        # aside, because importing onnx-ir and building the graph would keep the packing waiting for half a second
        graphs = [
            aside.submit(
                write_graph,
                architecture.spec,
                layout,
                one.recipe,
                folder / file,
                opset=one.opset,
                separate=one.separate,
                logit_rows=rows,
            )
            for one in variants
            for rows, file in one.files.items()
        ]
        if recipe.quantize == "gptq":
            assert tokens is not None
            pack_with_gptq(architecture, layout, tokens, folder / DATA_FILE, journal, threads, reporter)
        else:
            pack_weights(architecture, layout, folder / DATA_FILE, journal, threads, reporter)
        for graph in graphs:
            graph.result()
        kv_choice = settle_kv_cache(
            kv_cache,
            architecture.spec,
            layout,
            variants[0],
            folder,
            lambda: kv_tokens(architecture.spec, plan.tokenizer, text, tokens),
            reporter.part(kv_work),
        )
        if tokens is not None:
            forget_tokens(folder)
        if mix and tokens is not None:
            forget_sensitivities(folder)
        manifest = make_manifest(
            plan.checkpoint,
            architecture,
            layout,
            recipe,
            folder,
            source_files(),
            describe_text(text, tokens) if text and tokens is not None else None,
            plan.parameters,
            tuple(one.entry_with(kv_choice) for one in variants),
            mix,
            tokenizer=plan.tokenizer_facts,
            kv_cache=kv_choice,
        )
        write_manifest(folder, manifest)
    return manifest


class Reporter:
    """Adds up what worker threads have finished."""

    def __init__(self, total: int, on_progress: Callable[[Progress], None] | None) -> None:
        self._total, self._done, self._lock = total, 0, Lock()
        self._on_progress = on_progress

    def part(self, total: int) -> Callable[[int, int], None]:
        """What work of this size reports to: how many of how many equal pieces are done."""
        told = 0

        def report(done: int, pieces: int) -> None:
            nonlocal told
            now = total * done // pieces
            self(now - told)
            told = now

        return report

    def __call__(self, count: int) -> None:
        if self._on_progress is None:
            return
        with self._lock:
            self._done += count
            self._on_progress(Progress(self._done, self._total))


def export_key(
    checkpoint: Checkpoint,
    architecture: Architecture,
    recipe: Recipe,
    layout: Layout,
    mix: Mix | None,
    calibration: str | None,
) -> str:
    """Of everything that decides the bytes of the data file: an interrupted export continues under the same key."""
    stats = [(file.name, file.stat()) for file in checkpoint.files]
    facts = [
        edgephi.__version__,
        checkpoint.kind,
        checkpoint.name,
        checkpoint.revision,
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        asdict(recipe),
        asdict(architecture.spec),
        asdict(layout),
        asdict(mix.budget) if mix else None,
        calibration,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def source_hashes(files: tuple[Path, ...]) -> Iterator[Callable[[], tuple[FileEntry, ...]]]:
    """Hash the source files in a thread of their own; yields a function that waits for the result."""
    leaving = Event()

    def stop_early(count: int) -> None:
        if leaving.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1, thread_name_prefix="edgephi-hash") as pool:
        job = pool.submit(lambda: tuple(describe_file(file.parent, file.name, stop_early) for file in files))
        try:
            yield job.result
        finally:
            leaving.set()
