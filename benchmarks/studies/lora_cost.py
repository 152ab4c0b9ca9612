"""What LoRA adapters cost: processor time of a token without and with them, alone and in a batch.

    python -m edgephi.benchmarks.studies.lora_cost SOURCE [--rank 8] [--layers all] [--rounds 40] [--threads 2]

SOURCE is exported twice, without LoRA and with it, both with a KV cache in float. The adapters are random. The cases
take turns, so that whatever else the machine does meets them alike. What is printed is the median of the processor time
(of all threads, with idle threads asleep) that a run of one token for each row takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import cast

import numpy as np
from safetensors.numpy import save_file

from edgephi.bundle import Manifest
from edgephi.export.adapter import convert_adapter
from edgephi.export.api import export_model
from edgephi.export.lora import LoraLayers
from edgephi.runtime.adapters import Adapter
from edgephi.runtime.engines.onnx import OnnxEngine
from edgephi.runtime.engines.onnx_graph import DecoderGraph, KvPool
from edgephi.runtime.engines.onnx_sequence import OnnxSequence
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model

DEPTH = 64
"""Tokens before those that are measured."""
NAMES = ("one", "two")
SWITCHING = "LoRA bundle, another adapter in each run"


@dataclass(frozen=True)
class Case:
    """Rows that are computed together, each with an adapter or without."""

    title: str
    bundle: str
    rows: tuple[str | None, ...]


CASES = (
    Case("plain bundle", "plain", (None,)),
    Case("LoRA bundle, no adapter", "lora", (None,)),
    Case("LoRA bundle, one adapter", "lora", ("one",)),
    Case("batch of 2: plain bundle", "plain", (None, None)),
    Case("batch of 2: LoRA bundle, no adapter", "lora", (None, None)),
    Case("batch of 2: one adapter for both", "lora", ("one", "one")),
    Case("batch of 2: two adapters", "lora", ("one", "two")),
    Case("batch of 4: plain bundle", "plain", (None,) * 4),
    Case("batch of 4: one adapter for all", "lora", ("one",) * 4),
    Case("batch of 4: two adapters, two rows each", "lora", ("one", "one", "two", "two")),
)


def random_peft(folder: Path, manifest: Manifest, rank: int, seed: int) -> Path:
    """An adapter of all modules that a bundle takes, as PEFT would save it."""
    assert manifest.lora is not None
    rng, tensors, modules = np.random.default_rng(seed), {}, set()
    for target in manifest.lora.targets:
        for part in target.parts:
            modules.add(part.module.rpartition(".")[2])
            for layer in range(manifest.model.layers):
                name = f"base_model.model.model.layers.{layer}.{part.module}"
                a, b = rng.standard_normal((rank, target.inputs)), rng.standard_normal((part.stop - part.start, rank))
                tensors[f"{name}.lora_A.weight"] = (a / target.inputs**0.5).astype(np.float32)
                tensors[f"{name}.lora_B.weight"] = (0.02 * b).astype(np.float32)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Rows:
    """The sequences of a case."""

    def __init__(self, model: Model, adapters: Sequence[str | None]) -> None:
        assert isinstance(model.engine, OnnxEngine)
        self._engine, self._rows = model.engine, list[OnnxSequence]()
        prompt = [3 + place % 100 for place in range(DEPTH)]
        for name in adapters:
            row = model.open_sequence(256, adapter=model.find_adapter(name))
            assert isinstance(row, OnnxSequence)
            row.prefill(prompt, lambda: False)
            self._rows.append(row)

    def step(self) -> tuple[float, float]:
        """Compute a token for each row; seconds of the processor, and of the clock."""
        for row in self._rows:
            row.entering = 7, DEPTH  # the same place again, so that every run does the same work
            row.rewind(DEPTH)
        processor, clock = process_time(), perf_counter()
        self._engine.scheduler.alone(lambda: self._engine.slots.step(self._rows))
        return process_time() - processor, perf_counter() - clock


class Switching:
    """One row whose adapter changes with every run."""

    def __init__(self, bundle: Path, adapters: Sequence[Adapter | None], threads: int) -> None:
        graph = DecoderGraph(bundle / "model_rows.onnx", None, threads=threads, spinning=False, packed=False)
        self._pool, self._adapters = KvPool(graph), cycle(adapters)
        self._pool.grow(1, 256, [])

    def step(self) -> tuple[float, float]:
        """As `Rows.step`."""
        processor, clock = process_time(), perf_counter()
        self._pool.run(0, np.array([[7]]), [DEPTH], adapter=next(self._adapters))
        return process_time() - processor, perf_counter() - clock


def measure(folder: Path, source: str, rank: int, layers: LoraLayers, rounds: int, threads: int) -> list[list[object]]:
    """Title, rows, processor ms of a run (median), clock ms of a run (median), for each case."""
    export_model(source, folder / "plain", kv_cache="float")
    manifest = export_model(source, folder / "lora", lora=rank, lora_layers=layers)
    files = {name: folder / f"{name}.onnx_adapter" for name in NAMES}
    for seed, (name, file) in enumerate(files.items()):
        convert_adapter(random_peft(folder / name, manifest, rank, seed), folder / "lora", file)
    with ExitStack() as stack:
        options = {"threads": threads, "spinning": False, "prepacked": "never", "max_parallel": 32}
        plain = stack.enter_context(load(folder / "plain", "cpu", **options))  # type: ignore[arg-type]
        adapted = stack.enter_context(load(folder / "lora", "cpu", adapters=files, **options))  # type: ignore[arg-type]
        loaded: dict[str, Model] = {"plain": plain, "lora": adapted}
        runs: dict[str, Rows | Switching] = {case.title: Rows(loaded[case.bundle], case.rows) for case in CASES}
        pair = [adapted.find_adapter(name) for name in NAMES]
        runs[SWITCHING] = Switching(folder / "lora", pair, threads)
        seconds: dict[str, list[tuple[float, float]]] = {title: [] for title in runs}
        for turn in range(rounds + 1):
            for title in list(runs) if turn % 2 else reversed(runs):
                made = [runs[title].step() for _ in range(4)]
                seconds[title] += made[1:] if turn else []  # the first finds other weights in the processor's caches
    rows = {case.title: len(case.rows) for case in CASES}
    table: list[list[object]] = []
    for title, samples in seconds.items():
        processor, clock = zip(*samples, strict=True)
        table.append([title, rows.get(title, 1), 1000 * median(processor), 1000 * median(clock)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("source", help="checkpoint, as for edgephi export")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", choices=("attention", "mlp", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        layers = cast("LoraLayers", given.layers)
        table = measure(Path(folder), given.source, given.rank, layers, given.rounds, given.threads)
    if given.json:
        json.dump(table, sys.stdout)
        return
    base = cast("float", table[0][2])
    print(f"{'case':<42}{'ms a run':>10}{'ms a token':>12}{'of plain':>10}{'clock ms':>10}")
    for title, rows, processor, clock in cast("list[tuple[str, int, float, float]]", table):
        share = processor / rows / base
        print(f"{title:<42}{processor:>10.2f}{processor / rows:>12.2f}{share:>10.2f}{clock:>10.2f}")


if __name__ == "__main__":
    main()
