"""How time grows with layers: one published shape, random weights, cut to several depths, time = a + b · layers.

    python -m edgephi.benchmarks.studies.layer_growth --folder /disk/with/space --layers 1 2 4 8

a is what does not depend on depth (embedding, head, the runtime's own work), b is a layer. All bundles are loaded at
once; in every round each reads a prompt and decodes, in an order drawn anew. The times of random weights are those of
real ones: nothing in these kernels depends on the values.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np

from edgephi.benchmarks import arguments
from edgephi.benchmarks.bench.cases import Case
from edgephi.benchmarks.bench.measure import Instruments, Sample, measure
from edgephi.benchmarks.report import (
    add_turns,
    circumstances,
    in_one_line,
    markdown_table,
    progress,
    run,
    write_json,
)
from edgephi.benchmarks.studies.large_export import make_checkpoint
from edgephi.errors import UsageError
from edgephi.export.families.published import PUBLISHED
from edgephi.runtime.loading import load


@dataclass(frozen=True)
class Line:
    """y = start + per_layer · layers, by least squares."""

    start: float
    per_layer: float
    r2: float
    """Share of the variance it explains; 1 for two points."""

    def at(self, layers: int) -> float:
        return self.start + self.per_layer * layers


def fit(layers: Sequence[int], values: Sequence[float]) -> Line:
    """The line through two points or more."""
    slope, start = np.polyfit(layers, values, 1)
    y = np.asarray(values, dtype=np.float64)
    left = y - (start + slope * np.asarray(layers))
    around = float(((y - y.mean()) ** 2).sum())
    return Line(float(start), float(slope), 1.0 - float((left**2).sum()) / around if around else 1.0)


def make(model: str, layers: int, folder: Path, block_size: int) -> Path:
    """An int4 bundle of the shape with so many layers; the checkpoint it came from is removed.

    Raises:
        EdgephiError: no such shape, or the disk cannot hold it.
    """
    from edgephi.export.api import export_model

    checkpoint, bundle = folder / f"checkpoint-{layers}", folder / f"layers-{layers}"
    checkpoint.mkdir()
    make_checkpoint(model, checkpoint, layers)
    export_model(str(checkpoint), bundle, precision="int4", quantize="rtn", block_size=block_size)
    shutil.rmtree(checkpoint)
    return bundle


def measure_all(bundles: dict[int, Path], rounds: int, prompt: int, tokens: int) -> dict[int, list[Sample]]:
    """Samples by layers, one a round; an uncounted round warms up.

    Raises:
        EdgephiError: a bundle cannot be run.
    """
    ids = tuple(int(one) for one in np.random.default_rng(0).integers(0, 1000, prompt))
    case = Case("layers", "decode", "decode", (), ids, tokens)
    found: dict[int, list[Sample]] = {layers: [] for layers in bundles}
    with ExitStack() as stack:
        models = {
            layers: stack.enter_context(load(bundle, "cpu", prepacked="never")) for layers, bundle in bundles.items()
        }
        advance = stack.enter_context(progress("measuring", (rounds + 1) * len(models)))
        for number in range(rounds + 1):
            for layers in random.Random(number).sample(list(models), len(models)):
                sample = measure(models[layers].open_sequence, case, Instruments())
                if number:
                    found[layers].append(sample)
                advance()
    return found


def milliseconds(samples: Sequence[Sample], prompt: int, tokens: int) -> tuple[float, float, float]:
    """Medians: ms a token of the prompt, ms a decoded token, processor ms of all of it a decoded token."""
    return (
        1e3 * median(one.first_token_s for one in samples) / prompt,
        1e3 * median(sum(one.intervals_s) / len(one.intervals_s) for one in samples),
        1e3 * median(one.own_cpu_s for one in samples) / tokens,
    )


def main() -> None:
    """Parse the command line, export, measure, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="microsoft/Phi-4-mini-instruct",
        choices=PUBLISHED,
        metavar="NAME",
        help="a name from export/families/published.py",
    )
    parser.add_argument(
        "--folder", type=arguments.folder, required=True, help="where checkpoints and bundles are put, and removed"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--block-size", type=int, default=32)
    add_turns(parser, rounds=7, prompt=256, tokens=32)
    given = parser.parse_args()
    depths = sorted(set(given.layers))
    if len(depths) < 2 or depths[0] < 1 or given.tokens < 2:
        raise UsageError(
            "a line needs two numbers of layers, and a rate two tokens", remedy="Pass for example --layers 1 2 4 8"
        )
    with tempfile.TemporaryDirectory(dir=given.folder.resolve()) as scratch:
        with progress("exporting", len(depths)) as advance:
            bundles = {}
            for layers in depths:
                bundles[layers] = make(given.model, layers, Path(scratch), given.block_size)
                advance()
        found = measure_all(bundles, given.rounds, given.prompt, given.tokens)
    times = {layers: milliseconds(samples, given.prompt, given.tokens) for layers, samples in found.items()}
    columns = list(zip(*times.values(), strict=True))
    lines = dict(zip(("prefill", "decode", "processor"), (fit(depths, column) for column in columns), strict=True))
    rows = [(str(layers), *(f"{value:.2f}" for value in values)) for layers, values in times.items()]
    rows.append(("a + b · layers", *(f"{one.start:.2f} + {one.per_layer:.2f}" for one in lines.values())))
    rows.append(("R²", *(f"{one.r2:.3f}" for one in lines.values())))
    whole = cast(int, PUBLISHED[given.model]["num_hidden_layers"])
    rows.append((f"by the line: {whole}", *(f"{one.at(whole):.1f}" for one in lines.values())))
    print(markdown_table(("layers", "prefill, ms/token", "decode, ms/token", "processor, ms/new token"), rows))
    facts = circumstances("onnxruntime", "onnxruntime-genai")
    sizes = f"prompts of {given.prompt} tokens, {given.tokens} decoded, blocks of {given.block_size}"
    print(f"{given.model}, random weights, {sizes}, medians of {given.rounds} rounds\n{in_one_line(facts)}")
    if given.json:
        record = {
            "machine": facts,
            "model": given.model,
            "prompt": given.prompt,
            "tokens": given.tokens,
            "lines": {name: asdict(line) for name, line in lines.items()},
            "samples": {str(layers): [asdict(one) for one in samples] for layers, samples in found.items()},
        }
        write_json(given.json, record)


if __name__ == "__main__":
    run(main)
