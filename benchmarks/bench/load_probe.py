"""Run as a process of its own: load a bundle, answer one token, and print one JSON object with what that cost.

python -m edgephi.benchmarks.bench.load_probe DIR DEVICE time|memory

Libraries are imported before the clock starts. `time`: load_s, first_token_s (from the start of the load to the first
new token of an 8-token prompt), others_share (of the processors, other processes). `memory`: steady_private,
steady_file (or null), peak_private, peak_resident, of loading and 32 decoded tokens, watched by a thread, which is why
it is not timed as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter

from edgephi.benchmarks.bench.meters.memory import PeakOfPrivate, held, peak_resident
from edgephi.benchmarks.bench.meters.usage import read_usage
from edgephi.child import standard_streams
from edgephi.errors import EdgephiError
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import Sampling, chooser

PROMPT_TOKENS = 8
NEW_TOKENS = 32


def timed(folder: Path, device: str) -> dict[str, float | None]:
    """Load and answer one token, on the clock."""
    import onnxruntime_genai  # noqa: F401
    import tokenizers  # noqa: F401

    usage, started = read_usage(), perf_counter()
    with load(folder, device) as model:
        loaded = perf_counter()
        _decode(model, 1)
        done = perf_counter()
        others = read_usage().since(usage).others_share
    return {"load_s": loaded - started, "first_token_s": done - started, "others_share": others}


def weighed(folder: Path, device: str) -> dict[str, float | None]:
    """Load and decode, watched."""
    with PeakOfPrivate() as watch, load(folder, device) as model:
        _decode(model, NEW_TOKENS)
        steady = held()
    return {
        "steady_private": steady.private,
        "steady_file": steady.file_backed,
        "peak_private": watch.peak,
        "peak_resident": peak_resident(),
    }


def _decode(model: Model, count: int) -> None:
    choose = chooser(Sampling())
    count = min(count, model.context_length - PROMPT_TOKENS)
    sequence = model.open_sequence(PROMPT_TOKENS + count)
    sequence.prefill([0] * PROMPT_TOKENS, lambda: False)
    for _ in range(count):
        sequence.step(choose)


def main() -> None:
    """Exit status 1 and a sentence on stderr when the bundle does not load."""
    folder, device, what = sys.argv[1:]
    _, stdout = standard_streams()
    try:
        stdout.write(json.dumps((timed if what == "time" else weighed)(Path(folder), device)).encode())
        stdout.flush()
    except EdgephiError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
