"""What threads that wait actively gain and cost: the same bundle with and without, taking turns.

    python -m edgephi.benchmarks.studies.spinning DIR

Both are loaded at once. In every round each reads a prompt and decodes, in an order drawn anew, after a pause in which
the threads of the other one come to rest. Processor time is of this process; its share is of all processors.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

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
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model

PAUSE_S = 0.5


def compare(bundle: Path, rounds: int, prompt: int, tokens: int) -> dict[bool, list[Sample]]:
    """Samples with spinning (True) and without, one a round; an uncounted round warms both up.

    Raises:
        EdgephiError: the bundle cannot be run.
    """
    ids = tuple(int(one) for one in np.random.default_rng(0).integers(10, 1000, prompt))
    case = Case("spinning", "decode", "decode", (), ids, tokens)
    found: dict[bool, list[Sample]] = {True: [], False: []}
    with (
        load(bundle, "cpu", spinning=True) as one,
        load(bundle, "cpu", spinning=False) as other,
        progress("measuring", rounds + 1) as advance,
    ):
        models: dict[bool, Model] = {True: one, False: other}
        for number in range(rounds + 1):
            for spins in random.Random(number).sample((True, False), 2):
                time.sleep(PAUSE_S)
                sample = measure(models[spins].open_sequence, case, Instruments())
                if number:
                    found[spins].append(sample)
            advance()
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=arguments.bundle, metavar="DIR", help="what `edgephi export` wrote")
    add_turns(parser, rounds=9, prompt=128, tokens=64)
    given = parser.parse_args()
    found = compare(given.bundle, given.rounds, given.prompt, given.tokens)
    rows = []
    for spins, samples in found.items():
        rates = [len(one.intervals_s) / sum(one.intervals_s) for one in samples]
        rows.append(
            (
                "on" if spins else "off",
                f"{median(given.prompt / one.first_token_s for one in samples):.1f}",
                f"{median(rates):.1f}",
                f"{min(rates):.1f} to {max(rates):.1f}",
                f"{1e3 * median(one.own_cpu_s / given.tokens for one in samples):.1f}",
                f"{100 * median(one.cpu_share for one in samples):.0f} %",
            )
        )
    header = ("spinning", "prefill, tokens/s", "decode, tokens/s", "range", "processor ms/token", "of the processors")
    print(markdown_table(header, rows))
    facts = circumstances("onnxruntime", "onnxruntime-genai")
    print(in_one_line(facts))
    if given.json:
        samples_json = {"on" if spins else "off": [asdict(one) for one in taken] for spins, taken in found.items()}
        write_json(given.json, {"machine": facts, "samples": samples_json})


if __name__ == "__main__":
    run(main)
