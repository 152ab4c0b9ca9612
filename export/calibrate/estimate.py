"""How long calibrating and quantizing will take on this machine, before it begins: operations counted, over a speed
that is measured now.

The constants are processor time on an AMD EPYC (Zen 5) of one true layer of Phi-4-mini, stage by stage
(`benchmarks/studies/gptq_layer.py`).
"""

from __future__ import annotations

import time

import numpy as np

from edgephi.export.calibrate.sensitivity import TOKENS
from edgephi.export.calibrate.text import LENGTH, OWN_SEQUENCES
from edgephi.export.spec import Architecture
from edgephi.quantize.quantizer import Quantizer
from edgephi.quantize.workers import multiply, worker_pool, worker_threads

NANOSECONDS_TO_READ = 15.0
"""Of one core, for each weight that is read, hashed, rounded and written."""
NANOSECONDS_TO_WEIGH = 35.0
"""More, to find factors of channels and round by importance."""
NANOSECONDS_TO_TRY = 64.0
"""More, where each weight is tried in one format for a budget."""
NANOSECONDS_TO_FIT = 170.0
"""More, to search grids, round in turn and refine."""
SLOWNESS_OF_SAMPLING = 5.0
"""Of products of 8 rows at a time, with which a model writes its text, against large ones."""


def machine_speed() -> float:
    """Floating-point operations a second in large products on all threads; a fraction of a second is measured."""
    rng = np.random.default_rng(0)
    left, right = rng.random((256, 1024), np.float32), rng.random((1024, 1024), np.float32)
    count = 8 * worker_threads()
    multiply(left, right)
    with worker_pool() as pool:
        started = time.perf_counter()
        list(pool.map(lambda _: multiply(left, right), range(count)))
        seconds = time.perf_counter() - started
    return 2.0 * 256 * 1024 * 1024 * count / seconds


def expected_seconds(
    architecture: Architecture,
    quantizer: Quantizer,
    sequences: int,
    *,
    samples: bool,
    mixes: bool,
    rescales: bool,
    speed: float,
) -> float:
    """From the calibration text to the last weight; what follows, such as the KV cache's scales, is not counted.

    Args:
        quantizer: of the linear weights.
        sequences: of the text that layers are fitted to.
        samples: the model writes its text.
        mixes: every weight gets a format of its own.
        rescales: channels are rescaled.
        speed: as `machine_speed` gives it.
    """
    shapes = [weight.shape for weight in architecture.weights.values() if weight.role == "linear"]
    linear = float(sum(rows * columns for rows, columns in shapes))
    long, short = sequences * LENGTH, OWN_SEQUENCES * LENGTH
    operations = 2.0 * linear * short if quantizer.needs_importance or rescales else 0.0
    nanoseconds = NANOSECONDS_TO_READ * architecture.parameters
    if samples:
        operations += SLOWNESS_OF_SAMPLING * 2 * linear * long
        nanoseconds += NANOSECONDS_TO_READ * architecture.parameters
    if quantizer.needs_importance:
        nanoseconds += NANOSECONDS_TO_WEIGH * linear
    if quantizer.needs_inputs:
        # two models on the text; Hessian and drift; two factors; compensation, GPTQ and a pass of refinement
        for rows, columns in shapes:
            operations += 4.0 * rows * columns * long + 3.0 * columns**2 * long + 2 / 3 * columns**3
            operations += 7.0 * columns**2 * rows
        nanoseconds += NANOSECONDS_TO_FIT * linear
    if mixes and (quantizer.needs_importance or rescales):
        nanoseconds += NANOSECONDS_TO_TRY * linear
    elif mixes:  # every weight's error is followed through the layers behind it, half of them on average
        operations += linear * TOKENS * len(shapes)
    return operations / speed + nanoseconds / 1e9 / worker_threads()
