"""Time and memory of GPTQ for one layer of a published model's true shape, with random weights and hidden states.

    python -m edgephi.benchmarks.studies.gptq_layer microsoft/Phi-4-mini-instruct

Nothing here depends on the values. The whole model takes the number of its layers times as long, an estimate, and the
sampling of the calibration text on top.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, run
from edgephi.devices.memory import peak_resident_bytes
from edgephi.errors import UsageError
from edgephi.export.families.published import PUBLISHED


@dataclass(frozen=True)
class LayerCost:
    """(step, seconds, processor seconds); a step includes collecting its statistics. Bytes of the process."""

    steps: tuple[tuple[str, float, float], ...]
    peak_bytes: int
    layers: int

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds, _ in self.steps)

    @property
    def cpu_seconds(self) -> float:
        return sum(seconds for _, _, seconds in self.steps)


def measure(model: str, block_size: int, sequences: int, length: int) -> LayerCost:
    """Fit one layer and compute what the next one sees.

    Raises:
        UsageError: no such published model.
    """
    from edgephi.export.calibrate.fit import Passage, fit_layer
    from edgephi.export.calibrate.layer import LayerGraph, layer_weights, start_of
    from edgephi.export.families import describe
    from edgephi.export.families.naming import Blueprint
    from edgephi.export.spec import Checkpoint
    from edgephi.export.weights.layout import plan_storage
    from edgephi.export.weights.recipe import make_recipe

    if model not in PUBLISHED:
        raise UsageError(f"there is no published model {model!r} in the table", remedy="Choose a hub id of a Phi model")
    checkpoint = Checkpoint("folder", model, None, dict(PUBLISHED[model]), model, Blueprint(), (Path(),), None)
    architecture = describe(checkpoint)
    rng = np.random.default_rng(0)
    weights = layer_weights(architecture, 0)
    values = {name: rng.standard_normal(weight.shape, np.float32) for name, weight in weights.items()}
    for array in values.values():
        array *= np.float32(0.02)
    hidden = rng.standard_normal((sequences, length, architecture.spec.hidden_size), np.float32)
    layout = plan_storage(architecture, make_recipe("int4", block_size, quantize="gptq"))
    matrices = {name: layout.matrices[name] for name, weight in weights.items() if weight.role == "linear"}
    steps = []
    wall, cpu = time.perf_counter(), time.process_time()

    def finish(step: str) -> None:
        nonlocal wall, cpu
        steps.append((step, time.perf_counter() - wall, time.process_time() - cpu))
        wall, cpu = time.perf_counter(), time.process_time()

    graph = LayerGraph(architecture, 0, length)
    drifted = hidden + np.float32(0.05) * np.roll(hidden, 1, axis=0)
    exact, passage = dict(values), Passage(start_of(hidden), start_of(drifted))
    del hidden, drifted
    for name, _ in fit_layer(graph, passage, exact, values, matrices):
        finish(name.split(".")[2])
    graph.finish(passage.float, exact)
    graph.finish(passage.quantized, values)
    finish("next layer's input")
    return LayerCost(tuple(steps), peak_resident_bytes(), architecture.spec.layers)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="edgephi.benchmarks.studies.gptq_layer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="microsoft/Phi-4-mini-instruct",
        choices=PUBLISHED,
        metavar="MODEL",
        help="hub id of a Phi model",
    )
    parser.add_argument("--block-size", type=int, default=32, metavar="N", help="input channels of a block (32)")
    parser.add_argument("--sequences", type=int, default=32, metavar="N", help="calibration sequences (32)")
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a sequence (256)")
    given = parser.parse_args()
    cost = measure(given.model, given.block_size, given.sequences, given.length)
    total = ("one layer", cost.seconds, cost.cpu_seconds)
    rows = [(step, f"{wall:.1f}", f"{cpu:.1f}") for step, wall, cpu in (*cost.steps, total)]
    print(markdown_table(("step", "seconds", "processor seconds"), rows))
    print(
        f"\n{given.model}, blocks of {given.block_size}, {given.sequences * given.length:,} tokens; peak memory "
        f"{cost.peak_bytes / 1e9:.2f} GB; {cost.layers} layers take {cost.layers * cost.seconds / 60:.0f} minutes by "
        f"estimate.\n{in_one_line(circumstances('onnxruntime', 'numpy'))}"
    )


if __name__ == "__main__":
    run(main)
